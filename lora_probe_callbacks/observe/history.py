"""How often something was seen of each slot: what persistence is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from operator import eq
from typing import NamedTuple

from lora_probe_callbacks.facts import GradientFact, MoveFact, SlotFact, SlotHistory, StepUpdate

__all__ = ["History"]


class _Seen(NamedTuple):
    """What one decision adds, one entry a slot; while it is the same as before, most of the history stands."""

    gradients: Sequence[GradientFact | None]
    moves: Sequence[MoveFact | None]
    stopped: Sequence[bool | None]  # the learning rate is exactly zero; None without one
    half: Sequence[bool]
    rising: frozenset[int]  # slots whose learning rate is above the one before
    again: frozenset[int]  # slots whose step began with the norm with which the one before began, which changed it


class History:
    """What was seen of the slots so far.

    Args:
        slots: Number of slots.
    """

    def __init__(self, slots: int) -> None:
        self.rows: tuple[SlotHistory, ...] = (SlotHistory(),) * slots
        self.reads: tuple[int, ...] = (0,) * slots
        self._slots: Sequence[SlotFact] = ()  # as they were at the last decision, and which of them are in 16 bits
        self._half: Sequence[bool] = ()
        self._rates: tuple[float | None, ...] = (None,) * slots  # the last that were read
        self._starts: list[float | None] = [None] * slots  # Euclidean norms around the last update of each slot
        self._ends: list[float | None] = [None] * slots
        self._settled: _Seen | None = None  # what was seen when all rows stayed as they were

    def __len__(self) -> int:
        return len(self.rows)

    def advance(
        self,
        slots: Sequence[SlotFact],
        rates: Sequence[float | None],
        gradients: Sequence[GradientFact | None],
        moves: Sequence[MoveFact | None],
        update: StepUpdate | None,
        step: int,
    ) -> None:
        """Add one decision.

        Args:
            slots: The slots as they are now.
            rates: Their learning rates.
            gradients: What was read of them at this decision.
            moves: What the update before it did; empty if there was none.
            update: The same in numbers.
            step: The step being decided.
        """
        if slots is not self._slots:
            self._slots, self._half = slots, [s.half for s in slots]
        rising = frozenset[int]() if rates == self._rates else self._rising(rates)
        again = frozenset[int]() if update is None else self._again(update)
        stopped = [None if rate is None else rate == 0.0 for rate in rates]
        seen = _Seen(gradients, moves or (None,) * len(slots), stopped, self._half, rising, again)
        self.reads = tuple([n if g is None else n + 1 for n, g in zip(self.reads, gradients, strict=True)])
        known = zip(self._rates, rates, gradients, strict=True)
        self._rates = tuple([old if gradient is None or rate is None else rate for old, rate, gradient in known])
        if seen == self._settled:
            return
        rows = tuple(_next(old, i, seen, step) for i, old in enumerate(self.rows))
        stays = rows == self.rows
        self._settled = seen if stays else None
        self.rows = self.rows if stays else rows

    def _rising(self, rates: Sequence[float | None]) -> frozenset[int]:
        pairs = enumerate(zip(self._rates, rates, strict=True))
        return frozenset(i for i, (old, now) in pairs if old is not None and now is not None and now > old)

    def _again(self, update: StepUpdate) -> frozenset[int]:
        """Only where the last step changed the norm do equal norms mean equal values."""
        found = frozenset[int]()
        if any(map(eq, update.starts, self._starts)):
            columns = zip(update.starts, self._starts, self._ends, strict=True)
            found = frozenset(i for i, (now, old, end) in enumerate(columns) if now is not None and now == old != end)
        for i, (start, end) in enumerate(zip(update.starts, update.norms, strict=True)):
            if start is not None:
                self._starts[i], self._ends[i] = start, end
        return found


def _next(old: SlotHistory, index: int, seen: _Seen, step: int) -> SlotHistory:
    gradient, change = seen.gradients[index], seen.moves[index]
    if gradient is None and change is None:
        return old
    (
        missing, zero, zero_since, rate_zero, rising, unmoved, lost, put_back,
        had_gradient, had_signal, had_rate, had_move,
    ) = old  # fmt: skip
    if change is not None:
        # Judged against the gradient and the rate that were read before this update.
        could_move = had_gradient and zero == 0 and missing == 0 and rate_zero == 0
        unmoved = unmoved + 1 if could_move and not change.moved else 0
        lost = lost + 1 if could_move and seen.half[index] and not change.mostly else 0
        put_back = put_back + 1 if could_move and index in seen.again else 0
        had_move = had_move or change.moved
    if gradient is not None:
        stopped = seen.stopped[index]
        missing = 0 if gradient.present else missing + 1
        zero_since = (zero_since if zero else step) if gradient.zero else 0
        zero = zero + 1 if gradient.zero else 0
        had_gradient = had_gradient or gradient.present
        had_signal = had_signal or (gradient.present and not gradient.zero)
        rising = index in seen.rising
        if stopped is not None:
            rate_zero = rate_zero + 1 if stopped else 0
            had_rate = had_rate or not stopped
    # Every field by its place: dataclasses.replace takes five times as long, and there are hundreds.
    return SlotHistory(
        missing, zero, zero_since, rate_zero, rising, unmoved, lost, put_back,
        had_gradient, had_signal, had_rate, had_move,
    )  # fmt: skip
