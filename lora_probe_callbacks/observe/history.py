"""How often something was seen of each slot: what persistence is judged by."""

from __future__ import annotations

from collections.abc import Sequence

from lora_probe_callbacks.observe.facts import GradientFact, SlotFact, SlotHistory, StepUpdate, UpdateFact

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
    updates = (None,) * len(slots) if update is None else update.slots
    return [
        old if gradient is None and change is None else _next(old, slot, gradient, change, step)
        for old, slot, gradient, change in zip(history, slots, gradients, updates, strict=True)
    ]


def _next(
    old: SlotHistory, slot: SlotFact, gradient: GradientFact | None, change: UpdateFact | None, step: int
) -> SlotHistory:
    (
        read, missing, zero, zero_since, rate_zero, rate, rising, unmoved, lost, put_back, start, end,
        had_gradient, had_signal, had_rate, had_move,
    ) = old  # fmt: skip
    if change is not None:
        # Judged against the gradient and the rate that were read before this update.
        could_move = had_gradient and zero == 0 and missing == 0 and rate_zero == 0
        unmoved = unmoved + 1 if could_move and change.moved == 0 else 0
        lost = lost + 1 if could_move and slot.half and change.moved < 0.5 else 0
        # Only where the last step changed the norm do equal norms mean equal values.
        put_back = put_back + 1 if could_move and change.start == start and start != end else 0
        start, end, had_move = change.start, change.norm, had_move or change.moved > 0
    if gradient is not None:
        now = slot.learning_rate
        read += 1
        missing = 0 if gradient.present else missing + 1
        zero_since = zero_since if zero else step
        zero = zero + 1 if gradient.present and gradient.zero else 0
        had_gradient = had_gradient or gradient.present
        had_signal = had_signal or (gradient.present and not gradient.zero)
        rising = now is not None and rate is not None and now > rate
        if now is not None:
            rate_zero, rate = rate_zero + 1 if now == 0.0 else 0, now
        had_rate = had_rate or bool(now)
    # Every field by its place: dataclasses.replace takes five times as long, and there are hundreds.
    return SlotHistory(
        read, missing, zero, zero_since, rate_zero, rate, rising, unmoved, lost, put_back, start, end,
        had_gradient, had_signal, had_rate, had_move,
    )  # fmt: skip
