"""How often something was seen of each slot: what persistence is judged by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lora_probe_callbacks.observe.facts import GradientFact, SlotFact, SlotHistory, StepUpdate

__all__ = ["advance"]


def advance(
    history: Sequence[SlotHistory],
    slots: Sequence[SlotFact],
    gradients: Sequence[GradientFact | None],
    update: StepUpdate | None,
    step: int,
) -> list[SlotHistory]:
    """Add one decision to the history.

    Args:
        history: One entry a slot, up to now.
        slots: The slots as they are now.
        gradients: What was read of them at this decision.
        update: The update that came before it.
        step: The step being decided.

    Returns:
        One entry a slot.
    """
    return [
        _with_gradient(_with_update(old, slot, update, i), slot, gradients[i], step)
        for i, (old, slot) in enumerate(zip(history, slots, strict=True))
    ]


def _with_update(old: SlotHistory, slot: SlotFact, update: StepUpdate | None, index: int) -> SlotHistory:
    change = None if update is None else update.slots[index]
    if change is None:
        return old
    # Judged against the gradient and the rate that were read before this update.
    could_move = old.had_gradient and old.zero == 0 and old.missing == 0 and old.rate_zero == 0
    # Only where the last step changed the norm do equal norms mean equal values.
    put_back = change.start == old.start and old.start != old.end
    return dataclasses.replace(
        old,
        unmoved=old.unmoved + 1 if could_move and change.moved == 0 else 0,
        lost=old.lost + 1 if could_move and slot.half and change.moved < 0.5 else 0,
        put_back=old.put_back + 1 if could_move and put_back else 0,
        start=change.start,
        end=change.norm,
        had_move=old.had_move or change.moved > 0,
    )


def _with_gradient(old: SlotHistory, slot: SlotFact, gradient: GradientFact | None, step: int) -> SlotHistory:
    if gradient is None:
        return old
    rate = slot.learning_rate
    return dataclasses.replace(
        old,
        read=old.read + 1,
        missing=0 if gradient.present else old.missing + 1,
        zero=old.zero + 1 if gradient.present and gradient.zero else 0,
        zero_since=old.zero_since if old.zero else step,
        had_gradient=old.had_gradient or gradient.present,
        had_signal=old.had_signal or (gradient.present and not gradient.zero),
        rate_zero=old.rate_zero if rate is None else old.rate_zero + 1 if rate == 0.0 else 0,
        had_rate=old.had_rate or bool(rate),
        rate_rising=rate is not None and old.rate is not None and rate > old.rate,
        rate=old.rate if rate is None else rate,
    )
