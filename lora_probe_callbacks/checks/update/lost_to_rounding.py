"""LP403: the update is smaller than the tensor's precision."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped, warn
from lora_probe_callbacks.facts import Facts

STEPS = 3  # of the four steps that are always probed, the first has no gradient for A
LOST, POOR = 0.2, 0.5  # fraction of elements that move: below the first the role stands still


def judge(facts: Facts) -> Verdict:
    """Compare, for A and B apart, how many elements of 16-bit tensors a step moves."""
    if not facts.moves:
        return pending("no update was seen yet")
    if not any(facts.slots[i].half for i in facts.intended):
        return skipped("no adapter tensor is stored in 16 bits")
    for role, least in (("A", LOST), ("B", LOST), ("A", POOR), ("B", POOR)):
        slots = [
            i
            for i in sorted(facts.intended)
            if facts.slots[i].half and facts.slots[i].role == role and facts.moves[i] is not None
        ]
        lost = [i for i in slots if facts.history[i].lost]
        elements = sum(facts.slots[i].numel for i in slots)
        if not lost or not elements:
            continue
        fractions = facts.update.moved  # type: ignore[union-attr]  # moves are its kinds
        moved = sum(facts.slots[i].numel * fractions[i] for i in slots) / elements  # type: ignore[operator, misc]
        if moved >= least:
            continue
        if min(facts.history[i].lost for i in lost) < STEPS or any(facts.history[i].rate_rising for i in lost):
            return pending(
                f"{moved:.0%} of the elements of lora_{role} were moved by the last update; judged once the learning rate no longer rises"
            )
        got, expected = (
            f"{moved:.1%} of the elements of lora_{role} moved",
            "nearly all of them",
        )
        concerned = [i for i in facts.intended if facts.history[i].lost]
        text = f"the update of lora_{role} is lost to rounding: a step moves {moved:.1%} of its elements, the rest is smaller than 16 bits can hold"
        if least == LOST:
            return fail(text, concerned, cause=role, of_update=True, got=got, expected=expected)
        return warn(
            text,
            concerned,
            cause=role,
            of_update=True,
            fix="keep the adapter in float32 (autocast_adapter_dtype=True, PEFT's default); more elements moving at a higher learning rate settles it",
            got=got,
            expected=expected,
        )
    return ok()


CHECK = Check(
    code="LP403",
    name="lost-to-rounding",
    what="The adapter is stored in 16 bits and a step leaves most elements of A, or of B, bit-equal although they have gradients. It fails "
    "below 20% and warns below 50%, over three probed steps.",
    why="B begins at zero and moves freely, which hides that A stands still: an update below half a unit in the last place is rounded away.",
    fix="Keep the adapter in float32: autocast_adapter_dtype=True (PEFT's default), no .to(torch.bfloat16) after wrapping; or an optimizer with "
    "float32 master weights or stochastic rounding.",
    quiet="Warm-ups, while the learning rate rises; adapters in float32.",
    threads=("keras-team/keras-hub#2629", "verl-project/verl-omni#73", "huggingface/peft#1634"),
    explained_by=("LP208", "LP303", "LP402", "LP406"),
    judge=judge,
)
