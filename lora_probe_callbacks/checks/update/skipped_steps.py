"""LP406: steps are skipped again and again."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, warn
from lora_probe_callbacks.facts import Facts

LONG = 4 * PERSISTENT


def judge(facts: Facts) -> Verdict:
    """Count the steps in a row that were skipped for overflow."""
    row = facts.skipped_in_a_row
    if not row:
        return ok() if facts.ever_stepped or facts.moment == "step" else pending("no step was seen yet")
    if not facts.scaler and not facts.ever_stepped:
        return pending(f"{row} step(s) made gradients and no optimizer has stepped yet")  # LP401
    if row < PERSISTENT:
        return pending(f"{row} step(s) skipped in a row: the first steps of mixed precision may overflow")
    scale = "" if facts.loss_scale is None else f", loss scale now {facts.loss_scale:g}"
    got, expected = (
        f"{row} steps skipped in a row{scale}",
        "a step that is applied",
    )
    why = (
        " because the gradients are not finite"
        if facts.scaler
        else ": gradients were made, and the optimizer that owns the adapter did not step"
    )
    # Halving the scale cures an overflow that the scale has caused, and only that one.
    hopeless = facts.loss_scale is not None and facts.loss_scale < 1.0
    if hopeless or row >= LONG or (not facts.ever_stepped and facts.all_non_finite):
        return fail(
            f"{row} steps in a row were skipped{why}: nothing is learned",
            facts.intended,
            fix=""
            if facts.scaler
            else "look for what keeps the loop from calling step() on the optimizer that owns the adapter after backward()",
            got=got,
            expected=expected,
        )
    return warn(
        f"{row} steps in a row were skipped{why}",
        facts.intended,
        fix="if the loss scale still falls, wait: it fails when the scale is below 1 or after 16 steps; else look for inf or nan in the loss"
        if facts.scaler
        else "if these gradients are meant to be thrown away nothing is wrong, and it fails after 16 steps; else see under which condition "
        "the loop calls optimizer.step(), and whether something has replaced it",
        got=got,
        expected=expected,
    )


CHECK = Check(
    code="LP406",
    name="skipped-steps",
    what="The gradient scaler skips four probed steps in a row or more.",
    why="GradScaler skips without a message; the loss stays finite and is printed.",
    fix="Find the inf or nan in the loss or in the activations (float16 overflows at 65504); bfloat16 needs no scaler.",
    quiet="The first steps, in which the scale is still being found.",
    threads=("NVIDIA/apex#715", "zai-org/CogVideo#233", "radixark/miles#2198"),
    needs=("owned",),
    judge=judge,
)
