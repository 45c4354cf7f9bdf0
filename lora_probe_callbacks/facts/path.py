"""The way of the adapter: where its tensors stood before and after steps, and what else than a step has moved them.

Of every tensor a few elements are kept beside its norm. The norm tells that something was written, the elements where
it led: away from all that was, as a merge and a restart do, or back to where the tensor came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lora_probe_callbacks.facts.columns import Bools, Floats, Ints, Slots, Update

__all__ = ["FEW", "Look", "Path"]

FEW = 4  # elements of each tensor

UNDONE, PARTLY = 0.9, 0.7  # of the way since the last write
_SLOW = 0.95  # slow weights that are moved by a twentieth of the way or more go somewhere (Lookahead, Reptile)
_CONSTRAINED = 0.995  # a norm that is bounded takes back what points outwards: the rest of the way must be nothing
_COLLINEAR = 1e-3
_ROUNDING = 1e-6  # of the size of a tensor: no way


@dataclass(frozen=True, eq=False)
class Look:
    """Where some slots stood at one moment.

    Attributes:
        step: The step that was about to be made, or was made.
        after: Directly after it; else directly before.
        known: The slots that were read.
        norm: Euclidean norm of each, nan where it was not read.
        few: A few elements of each, [slots, FEW]; zeros where there are fewer.
        next: The optimizer has made no step since the last look after one.
    """

    step: int
    after: bool
    known: Bools
    norm: Floats
    few: NDArray[np.float64]
    next: bool = True


@dataclass(frozen=True, eq=False)
class Path:
    """Where each slot came from, and how often what steps did was taken back.

    Attributes:
        start: A few elements as they were after the last write that was no step, [slots, FEW].
        start_step: The step that began there, -1 before the first look.
        end: The same after the last step that was looked at.
        end_norm: Euclidean norm then.
        end_step: That step, -1 before the first.
        driven: It had a gradient other than zero in that step, or nobody knows.
        way: Steps from ``start_step`` to the last look that was judged.
        fraction: What part of them was taken back at the last write, nan without one.
        undone: Five for every time in a row that a write took back nearly all; two, where that was a single step.
        partly: The same for most of it.
        times: Times in a row that either happened.
        under_way: Had gone somewhere when such a write was seen.
        seen: (step, step): the last write was after the one and before the other.
        base: Unit to whether its base weight had changed at the last decision.
    """

    start: NDArray[np.float64]
    start_step: Ints
    end: NDArray[np.float64]
    end_norm: Floats
    end_step: Ints
    driven: Bools
    way: Ints
    fraction: Floats
    undone: Ints
    partly: Ints
    times: Ints
    under_way: Bools
    seen: tuple[int, int] | None = None
    base: Mapping[int, bool] | None = None

    @classmethod
    def empty(cls, size: int) -> Path:
        """Nothing was seen yet.

        Args:
            size: Number of slots.

        Returns:
            The path before the first look.
        """
        few, none, no = np.zeros((size, FEW)), np.full(size, -1), np.zeros(size, np.bool_)
        number, nan = np.zeros(size, np.int64), np.full(size, np.nan)
        return cls(few, none, few, nan, none, no, number, nan, number, number, number, no)

    def __len__(self) -> int:
        return len(self.start)

    def along(
        self,
        looks: Sequence[Look],
        slots: Slots,
        update: Update | None,
        base: Mapping[int, bool] | None,
        step: int,
    ) -> Path:
        """Add the looks of one decision.

        Args:
            looks: In their order.
            slots: The slots as they are now.
            update: What the update before this decision did, if there was one.
            base: Unit to whether its base weight has changed since the last decision; None if none could be read.
            step: The step being decided.

        Returns:
            The path with them.
        """
        path = self
        for look in looks:
            if look.after:
                path = path._stepped(look, update)
            else:  # of a second optimizer, whose step began after the last decision
                path = path._begins(look, slots, base if look.step == step else self.base)
        return replace(path, base=base) if looks else path

    def _stepped(self, look: Look, update: Update | None) -> Path:
        known = look.known
        driven = self.driven | known  # of a step that is not probed no gradient was read
        if update is not None and update.step == look.step:
            driven = np.where(known & update.stepped, update.gradient_norm > 0.0, self.driven)
        return replace(
            self,
            end=np.where(known[:, None], look.few, self.end),
            end_norm=np.where(known, look.norm, self.end_norm),
            end_step=np.where(known, look.step, self.end_step),
            driven=driven,
        )

    def _begins(self, look: Look, slots: Slots, base: Mapping[int, bool] | None) -> Path:
        """A step begins: does everything stand where the last one left it?"""
        first = look.known & (self.start_step < 0)
        start = np.where(first[:, None], look.few, self.start)
        start_step = np.where(first, look.step, self.start_step)
        path = replace(self, start=start, start_step=start_step)
        known = look.known & ~first & (self.end_step >= 0)
        apart = (look.norm != self.end_norm) | (look.few != self.end).any(1)
        wrote = known & apart & look.next & np.isfinite(look.norm) & np.isfinite(self.end_norm)
        came_back = known & (not look.next)
        if not (wrote | came_back).any():
            return path
        return path._written(look, slots, base, wrote, came_back)

    def _written(
        self, look: Look, slots: Slots, base: Mapping[int, bool] | None, wrote: Bools, came_back: Bools
    ) -> Path:
        way, back = self.end - self.start, look.few - self.end
        length, left = (np.linalg.norm(x, axis=1) for x in (way, look.few - self.start))
        gone = look.known & self.driven & (length > _ROUNDING * np.linalg.norm(self.end, axis=1))
        gone &= ~_masked_by_its_method(slots)
        judged = gone & (wrote | came_back)
        fraction = np.where(judged, 1.0 - left / np.where(length > 0, length, 1.0), np.nan)
        here = wrote & judged
        most = max(UNDONE, _CONSTRAINED if _shrinks(look.few[here], self.end[here]) else 0.0)
        dropped = _dropped(look, self.end_norm, wrote, slots)
        merged = _merged(base, slots, look.norm == 0.0)
        followed = merged | (here & _follows(way[here], back[here]))
        undone = judged & ((fraction >= np.where(came_back, 0.95, most)) | (dropped & wrote)) & ~followed
        partly = undone | (here & (fraction >= PARTLY) & ~followed & (most < _CONSTRAINED))
        weight = np.where(self.end_step > self.start_step, 5, 2)
        restart = wrote | undone
        settled = restart & judged
        concerned = undone | partly
        return replace(
            self,
            start=np.where(restart[:, None], look.few, self.start),
            start_step=np.where(restart, look.step, self.start_step),
            way=np.where(concerned, self.end_step - self.start_step + 1, self.way),
            fraction=np.where(concerned, np.where(dropped, 1.0, fraction), self.fraction),
            undone=np.where(undone, self.undone + weight, np.where(settled, 0, self.undone)),
            partly=np.where(partly, self.partly + weight, np.where(settled, 0, self.partly)),
            times=np.where(concerned, self.times + 1, np.where(settled, 0, self.times)),
            under_way=gone if concerned.any() else self.under_way,
            seen=(int(self.end_step[concerned].max()), look.step) if concerned.any() else self.seen,
        )


def _masked_by_its_method(slots: Slots) -> Bools:
    """AdaLoRA sets what it has pruned back to zero after every step (peft 0.21)."""
    return np.array([part == "lora_E" for part in slots.part], np.bool_)


def _shrinks(now: NDArray[np.float64], before: NDArray[np.float64]) -> bool:
    """Nothing has changed its sign or grown, and nothing has lost more than half: a bound on values or norms."""
    if not now.size:
        return False
    size = np.abs(before) * (1 + 1e-6)
    inside = (np.abs(now) <= size) & (now * before >= 0.0) & (np.abs(now) >= 0.5 * np.abs(before))
    return bool(inside.mean() >= 0.98)


def _follows(way: NDArray[np.float64], back: NDArray[np.float64]) -> bool:
    """It was moved back along its way, and not to its beginning."""
    along = float((way * way).sum())
    if not along:
        return False
    part = -float((way * back).sum()) / along
    return part < _SLOW and float(np.linalg.norm(back + part * way)) <= _COLLINEAR * float(np.linalg.norm(back))


def _dropped(look: Look, before: Floats, wrote: Bools, slots: Slots) -> Bools:
    """Slots of the units that add nothing any more: a factor is exactly zero, and was not after the last step."""
    pair = slots.of_role("A") | slots.of_role("B")
    return slots.of_units(slots.unit[wrote & pair & (look.norm == 0.0) & (before > 0.0)].tolist())


def _merged(base: Mapping[int, bool] | None, slots: Slots, zero: Bools) -> Bools:
    """Slots whose values may have gone into the base weight: it has changed, or nobody can say."""
    if not base:
        return slots.of_units(slots.unit[zero].tolist())
    default = any(base.values())
    per_unit = np.array([base.get(u, default) for u in range(int(slots.unit.max(initial=-1)) + 1)], np.bool_)
    found: Bools = per_unit[slots.unit]
    return found
