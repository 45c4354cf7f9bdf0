"""LP501: a gradient or a parameter is not finite."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, some
from lora_probe_callbacks.facts import Facts, count


def judge(facts: Facts) -> Verdict:
    """Look for inf and nan in adapter tensors and in gradients that will be applied."""
    gradients, update = facts.gradients, facts.update
    if update is not None and (broken := update.broken).any():
        return fail(
            f"{count(broken)} adapter tensors hold inf or nan after the step: {some(facts.slots.names(broken))}",
            broken,
            of_update=True,
            got=f"{count(broken)} tensors not finite",
            expected="0",
        )
    bad = gradients.broken
    if not bad.any():
        seen = gradients.present.any() or (update is not None and update.moved.any())
        return ok() if seen else pending("no gradient was read at this decision")
    number, names = count(bad), some(facts.slots.names(bad))
    if facts.scaler:
        return pending(f"{number} gradients are not finite ({names}); the gradient scaler skips such a step")
    if not facts.gradients_final:
        return pending(f"{number} gradients are not finite ({names}); the update will tell whether they were applied")
    return fail(
        f"{number} adapter gradients are inf or nan and are about to be applied: {names}",
        bad,
        got=f"{number} gradients not finite",
        expected="0",
    )


CHECK = Check(
    code="LP501",
    name="non-finite",
    what="A gradient that is about to be applied, or an adapter tensor after a step, holds inf or nan.",
    why="Adam keeps a nan for ever; some losses print 0.0 over it.",
    fix="Look at the batch and the loss of this step (log of 0, division by a count of 0, float16 overflow), and clip or skip such steps.",
    quiet="Overflows that a gradient scaler catches (LP406 counts them).",
    threads=("bitsandbytes-foundation/bitsandbytes#152",),
    explained_by=("LP406",),
    needs=("owned",),
    judge=judge,
)
