"""LP401: the step did not move the adapter."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, some, warn
from lora_probe_callbacks.facts import Facts

# A loop may throw away its first gradients on purpose; not so many without a single step.
LONG = 4 * PERSISTENT


def judge(facts: Facts) -> Verdict:
    """Look for tensors with a gradient and a rate that no step has moved."""
    if not facts.moves:
        thrown_away = 0 if facts.scaler else facts.skipped_in_a_row
        backwards = thrown_away + sum(f.received for f in facts.forwards)
        over = facts.moment == "end" or thrown_away >= LONG
        if over and not facts.ever_stepped and backwards >= PERSISTENT:
            return fail(
                f"no optimizer that owns the adapter has stepped: {backwards} backward passes and not one update",
                facts.intended,
                cause="no step",
                got="0 calls of optimizer.step()",
                expected="a step after the backward passes that it accumulates",
                fix="call step() on the optimizer that was given to the probe, or give it the one that the loop steps",
            )
        return pending("no update was seen yet")
    # What had no gradient could not move: while no step moves B, every gradient of A is zero.
    judged = [
        i
        for i in sorted(facts.intended)
        if (move := facts.moves[i]) is not None and (move.moved or facts.history[i].unmoved)
    ]
    still = [i for i in judged if facts.history[i].unmoved]
    if not still:
        return _put_back(facts, judged)
    long = [i for i in still if facts.history[i].unmoved >= PERSISTENT]
    if not long:
        return pending(f"{len(still)} adapter tensors were not moved by the last update")
    row = facts.history[long[0]].unmoved
    gone = all(facts.update.gradient_norms[i] is None for i in long)  # type: ignore[union-attr]  # moves are its kinds
    got, expected = (
        f"0 elements moved in {row} probed steps, with a learning rate and a gradient"
        + (" that was gone when step() returned: something clears it after the backward" if gone else ""),
        "moved by every step",
    )
    if len(long) == len(judged) and not any(facts.history[i].had_move for i in long):
        return fail(
            f"no step has moved the adapter, {row} probed steps now, though it has gradients and a learning rate",
            long,
            of_update=True,
            got=got,
            expected=expected,
        )
    return warn(
        f"{len(long)} adapter tensors were not moved in {row} probed steps in a row: {some([facts.slots[i].name for i in long])}",
        long,
        of_update=True,
        fix="look for code that writes the old values back, and for an optimizer that keeps a copy of its own",
        got=got,
        expected=expected,
    )


def _put_back(facts: Facts, judged: list[int]) -> Verdict:
    """Steps move the adapter, and something writes the old values back before the next one."""
    back = [i for i in judged if facts.history[i].put_back >= PERSISTENT - 1]
    if not back:
        return ok()
    # What has no gradient of its own may go on, by weight decay: A, while B is put back to zero.
    learning = [i for i in judged if not facts.history[i].zero and not facts.history[i].missing]
    report = fail if set(learning) <= set(back) else warn
    return report(
        f"{len(back)} adapter tensors are put back after every step: {PERSISTENT} probed steps began with the same values",
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
    what="An adapter tensor with a gradient and a learning rate above 0 is bit-equal before and after the step, four probed steps in a row; or the steps move it, and each of four begins with the same values again.",
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
    judge=judge,
)
