"""LP605: a kind of tensor that belongs to the adapter and that nobody trains."""

from __future__ import annotations

import numpy as np

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, some
from lora_probe_callbacks.facts import Bools, Facts, count, indices


def judge(facts: Facts) -> Verdict:
    """Look for parts (a magnitude, a modules_to_save copy) that are frozen as a whole, or were never made."""
    for part, layers in facts.coverage.unmade if facts.coverage is not None else ():
        return fail(
            f"{len(layers)} adapted layers have no {part}, which the configuration asks for: {some(layers)}",
            cause=part,
            got=f"{part} missing in {len(layers)} layers",
            expected=f"{part} in each of them",
            fix="attach the adapter anew from its configuration: a variant that is changed afterwards does not take effect",
        )
    slots = facts.slots
    judged = facts.intended & facts.on_now
    if not judged.any():
        return pending("the adapter is not active at this moment")
    for part in dict.fromkeys(slots.part[i] for i in indices(judged & slots.of_role("other"))):
        of_part = np.array([other == part for other in slots.part], np.bool_)
        mine, rest = judged & of_part, judged & ~of_part
        if slots.requires_grad[mine].any() or not slots.requires_grad[rest].any():
            continue  # where nothing trains LP203 says so
        if facts.history.had_gradient[mine].any() or _other_turn(facts, mine):
            continue  # frozen for a time: A and B train, and the rest has its turn
        return fail(
            f"every {part} of the adapter is frozen, {count(mine)} tensors, while the rest trains: {some(slots.names(mine))}",
            mine,
            cause=part,
            got=f"0 of {count(mine)} trainable",
            expected=f"{count(mine)} of {count(mine)}, or frozen=({part!r},)",
            fix=f"set requires_grad on them before the optimizer is built; if they are meant to stay, pass frozen=({part!r},)",
        )
    return ok()


def _other_turn(facts: Facts, slots: Bools) -> bool:
    """toggle_optimizer freezes what the other optimizers own."""
    owner = facts.slots.owner[slots]
    return facts.optimizers > 1 and bool(((owner >= 0) & (owner != facts.optimizer)).any())


CHECK = Check(
    code="LP605",
    name="untrained-part",
    what="All tensors of one kind beside A and B (DoRA's magnitude, a modules_to_save copy, token rows) are frozen while A and B train, or the "
    "configuration asks for a kind that was not made.",
    why="The run is one of plain LoRA under another name, or a head stays random; loss and gradient norms look right.",
    fix="Leave to PEFT what requires gradients; freeze by name only what is meant.",
    quiet="Parts that PEFT keeps frozen by design, frozen=(...), toggle_optimizer, adapters that are not active.",
    threads=("meta-pytorch/torchtune#2250",),
    explained_by=("LP101", "LP102", "LP105", "LP106"),
    needs=("coverage",),
    judge=judge,
)
