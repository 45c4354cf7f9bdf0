"""LP401: the step did not move the adapter."""

from __future__ import annotations

import numpy as np

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, skipped, some, warn
from lora_probe_callbacks.checks.update._undone import begin_alike, undone_slots
from lora_probe_callbacks.facts import Bools, Facts, Update, count

# A loop may throw away its first gradients on purpose; not so many without a single step.
LONG = 4 * PERSISTENT
# Gradients may be accumulated over as many backward passes as one likes; hardly over more than these.
CERTAIN = 128
SINGLE = 2.0**-24  # half a unit in the last place, relative
GATHERING = 2 * PERSISTENT  # RAdam's first five steps at the usual betas
TIMES = 4  # as many as between two steps before


def judge(facts: Facts) -> Verdict:
    """Look for tensors with a gradient and a rate that no step has moved."""
    owners = set(facts.slots.owner[facts.intended & facts.slots.owned].tolist())
    stepped = facts.ever_stepped or any(steps for owner, steps in enumerate(facts.steps_of) if owner in owners)
    idle = (_stopped(facts, owners) or _idle_optimizer(facts)) if stepped else _no_step(facts)
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
    # RAdam and its kin gather moments first and step later; what swallows a step gathers nothing.
    gathering = facts.gathering and not history.had_move[judged].any() and _would_show(facts, update, still)
    long = still & (history.unmoved >= (GATHERING if gathering else PERSISTENT))
    if not long.any():
        return pending(f"{count(still)} adapter tensors were not moved by the last update")
    return _still(facts, update, long, whole=count(long) == count(judged) and not history.had_move[long].any())


def _would_show(facts: Facts, update: Update, slots: Bools) -> bool:
    """A step of the size of the learning rate is more than 32 bits lose."""
    size = facts.slots.rate[slots] * np.sqrt(facts.slots.numel[slots])
    return bool((size > SINGLE * update.start[slots]).all())


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


def _stopped(facts: Facts, owners: set[int]) -> Verdict | None:
    """Steps were made, and then no more, while gradients go on to be accumulated."""
    if facts.moment not in ("waiting", "end") or not facts.since_step or not owners:
        return None
    backwards = min(facts.since_step[owner] for owner in owners)
    usual = max(facts.usual_passes[owner] for owner in owners)
    if backwards < max(2 * LONG, TIMES * usual):
        return None
    report = fail if backwards >= max(CERTAIN, 2 * TIMES * usual) else warn
    return report(
        f"the optimizer that owns the adapter has stopped stepping: {backwards} backward passes since its last step",
        facts.intended,
        cause="stopped",
        got=f"0 calls of optimizer.step() in {backwards} backward passes",
        expected=f"a step after {usual} of them, as before",
        fix="see under which condition the loop calls optimizer.step(), and whether something has replaced it; if gradients are accumulated "
        "over that many backward passes from here on, nothing is wrong so far",
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
    undone = undone_slots(facts)
    if undone.any() and not begin_alike(facts, undone):
        return skipped("explained by LP409")
    # What has no gradient of its own may go on, by weight decay: A, while B is put back to zero.
    learning = judged & (history.zero == 0) & (history.missing == 0)
    if (learning & ~back & (facts.path.undone > 0)).any():
        return pending("what else is written may be taken back as well")  # LP409
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
    what="An adapter tensor with a gradient and a learning rate above 0 is bit-equal before and after the step, four probed steps in a row; or the steps move it, and each of four begins with the same values again; or an optimizer never steps, however many backward passes went by (it warns at 16, and fails at 128 or at twice the accumulation that was declared), or stops stepping (it warns at 32 or four times as many passes as a step had before, and fails at 128 or eight times as many).",
    why="step() returned. An optimizer that steps a copy, or code that restores weights, leaves the model as it was.",
    fix="See what runs between optimizer.step() and the next forward, and whether the optimizer keeps master copies that are never written back.",
    quiet="Optimizers that gather moments before they step (RAdam, schedule-free RAdam: eight probed steps), steps skipped for overflow, a learning rate of 0, gradients of exactly zero; rounding is LP403.",
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
