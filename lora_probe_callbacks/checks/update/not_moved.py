"""LP401: the step did not move the adapter."""

from __future__ import annotations

import numpy as np

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, some, warn
from lora_probe_callbacks.facts import Bools, Facts, Update, count

# A loop may throw away its first gradients on purpose; not so many without a single step.
LONG = 4 * PERSISTENT
# Gradients may be accumulated over as many backward passes as one likes; hardly over more than these.
CERTAIN = 128


def judge(facts: Facts) -> Verdict:
    """Look for tensors with a gradient and a rate that no step has moved."""
    owners = set(facts.slots.owner[facts.intended & facts.slots.owned].tolist())
    stepped = facts.ever_stepped or any(steps for owner, steps in enumerate(facts.steps_of) if owner in owners)
    idle = _idle_optimizer(facts) if stepped else _no_step(facts)
    if facts.update is None:
        return idle or pending("no update was seen yet")
    verdict = _judge_update(facts, facts.update)
    return idle if idle is not None and verdict.status in ("pass", "pending") else verdict


def _judge_update(facts: Facts, update: Update) -> Verdict:
    history = facts.history
    # What had no gradient could not move: while no step moves B, every gradient of A is zero.
    judged = facts.intended & update.stepped & (update.moved | (history.unmoved > 0))
    if not judged.any():
        return pending("no tensor had a gradient that could have moved it")
    still = judged & (history.unmoved > 0)
    if not still.any():
        return _put_back(facts, judged)
    long = still & (history.unmoved >= PERSISTENT)
    if not long.any():
        return pending(f"{count(still)} adapter tensors were not moved by the last update")
    return _still(facts, update, long, whole=count(long) == count(judged) and not history.had_move[long].any())


def _no_step(facts: Facts) -> Verdict | None:
    """Backward passes, and no optimizer that owns the adapter has stepped."""
    thrown_away = 0 if facts.scaler else max(facts.skipped_in_a_row, *(one.lost for one in facts.accumulated[-1:]), 0)
    backwards = max(facts.passes, thrown_away + sum(f.received for f in facts.forwards))
    limit = CERTAIN if facts.accumulation is None else 2 * facts.accumulation
    over = facts.moment == "end" or thrown_away >= LONG or backwards >= max(LONG, limit)
    if backwards < PERSISTENT or not (over or facts.moment == "waiting"):
        return None
    text = f"no optimizer that owns the adapter has stepped: {backwards} backward passes and not one update"
    given = "call step() on the optimizer that was given to the probe"
    fix = (
        f"{given}, or give it the one that the loop steps"
        if over
        else f"if gradients are accumulated over more than {backwards} backward passes nothing is wrong so far; else {given}, "
        "and see that an accumulation is not longer than the data"
    )
    report = fail if over else warn
    return report(
        text,
        facts.intended,
        cause="no step",
        got="0 calls of optimizer.step()",
        expected="a step after the backward passes that it accumulates",
        fix=fix,
    )


def _idle_optimizer(facts: Facts) -> Verdict | None:
    """One optimizer of several has not stepped once, while another has stepped again and again."""
    most = max(facts.steps_of, default=0)
    if most < LONG or facts.moment != "step":
        return None
    idle = [number for number, steps in enumerate(facts.steps_of) if not steps]
    slots = facts.intended & facts.slots.requires_grad & np.isin(facts.slots.owner, idle)
    slots &= ~facts.slots_of_units(facts.bad_units()) & (
        facts.intended if facts.called_slots is None else facts.called_slots
    )
    if not slots.any():
        return None
    report = fail if most >= CERTAIN else warn
    return report(
        f"the optimizer of {count(slots)} adapter tensors has not stepped once, while another has made {most} steps: "
        f"{some(facts.slots.names(slots))}",
        slots,
        cause="optimizer",
        got="0 calls of its step()",
        expected="a step after the backward passes that it accumulates",
        fix="call step() on each optimizer that owns a part of the adapter; if its turn is still to come nothing is wrong",
    )


def _still(facts: Facts, update: Update, long: Bools, *, whole: bool) -> Verdict:
    row = int(facts.history.unmoved[np.flatnonzero(long)[0]])
    gone = not update.received[long].any()
    got, expected = (
        f"0 elements moved in {row} probed steps, with a learning rate and a gradient"
        + (" that was gone when step() returned: something clears it after the backward" if gone else ""),
        "moved by every step",
    )
    if whole:
        return fail(
            f"no step has moved the adapter, {row} probed steps now, though it has gradients and a learning rate",
            long,
            of_update=True,
            got=got,
            expected=expected,
        )
    return warn(
        f"{count(long)} adapter tensors were not moved in {row} probed steps in a row: {some(facts.slots.names(long))}",
        long,
        of_update=True,
        fix="look for code that writes the old values back, and for an optimizer that keeps a copy of its own",
        got=got,
        expected=expected,
    )


def _put_back(facts: Facts, judged: Bools) -> Verdict:
    """Steps move the adapter, and something writes the old values back before the next one."""
    history = facts.history
    back = judged & (history.put_back >= PERSISTENT - 1)
    if not back.any():
        return ok()
    # What has no gradient of its own may go on, by weight decay: A, while B is put back to zero.
    learning = judged & (history.zero == 0) & (history.missing == 0)
    report = warn if (learning & ~back).any() else fail
    return report(
        f"{count(back)} adapter tensors are put back after every step: {PERSISTENT} probed steps began with the same values",
        back,
        cause="put back",
        of_update=True,
        got="moved by each step, and equal before all of them",
        expected="what the step wrote",
        fix="look for code that loads, resets or copies adapter values between optimizer.step() and the next forward",
    )


CHECK = Check(
    code="LP401",
    name="not-moved",
    what="An adapter tensor with a gradient and a learning rate above 0 is bit-equal before and after the step, four probed steps in a row; or the steps move it, and each of four begins with the same values again; or an optimizer never steps, however many backward passes went by (it warns at 16, and fails at 128 or at twice the accumulation that was declared).",
    why="step() returned. An optimizer that steps a copy, or code that restores weights, leaves the model as it was.",
    fix="See what runs between optimizer.step() and the next forward, and whether the optimizer keeps master copies that are never written back.",
    quiet="Steps skipped for overflow, a learning rate of 0, gradients of exactly zero; rounding is LP403.",
    threads=("deepspeedai/DeepSpeed#7632", "huggingface/accelerate#2665"),
    explained_by=(
        "LP101",
        "LP102",
        "LP103",
        "LP201",
        "LP202",
        "LP203",
        "LP208",
        "LP301",
        "LP302",
        "LP303",
        "LP403",
        "LP406",
    ),
    needs=("owned",),
    judge=judge,
)
