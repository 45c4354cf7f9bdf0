"""LP403: the update is smaller than the tensor's precision."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped, warn
from lora_probe_callbacks.facts import Facts, Role

STEPS = 3  # of the four steps that are always probed, the first has no gradient for A
GATHERING = 8  # an optimizer that gathers moments first may move nothing for so long
LOST, POOR = 0.2, 0.5  # fraction of elements that move: below the first the role stands still
ROLES: tuple[Role, Role] = ("A", "B")


def judge(facts: Facts) -> Verdict:
    """Compare, for A and B apart, how many elements of 16-bit tensors a step moves."""
    if facts.update is None:
        return pending("no update was seen yet")
    half = facts.intended & facts.slots.half
    if not half.any():
        return skipped("no adapter tensor is stored in 16 bits")
    history, update = facts.history, facts.update
    if facts.gathering and not history.had_move[half].any() and (history.lost[half] < GATHERING).all():
        return pending("the optimizer has moved nothing so far")  # LP401
    for role, least in ((role, least) for least in (LOST, POOR) for role in ROLES):
        slots = half & facts.slots.of_role(role) & update.stepped
        lost = slots & (history.lost > 0)
        elements = int(facts.slots.numel[slots].sum())
        if not lost.any() or not elements:
            continue
        moved = float((facts.slots.numel[slots] * update.fraction[slots]).sum()) / elements
        if moved >= least:
            continue
        if int(history.lost[lost].min()) < STEPS or history.rate_rising[lost].any():
            return pending(
                f"{moved:.0%} of the elements of lora_{role} were moved by the last update; judged once the learning rate no longer rises"
            )
        return _lost(facts, role, moved, certain=least == LOST)
    return ok()


def _lost(facts: Facts, role: str, moved: float, *, certain: bool) -> Verdict:
    concerned = facts.intended & (facts.history.lost > 0)
    got, expected = f"{moved:.1%} of the elements of lora_{role} moved", "nearly all of them"
    text = f"the update of lora_{role} is lost to rounding: a step moves {moved:.1%} of its elements, the rest is smaller than 16 bits can hold"
    if certain:
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
    needs=("owned",),
    judge=judge,
)
