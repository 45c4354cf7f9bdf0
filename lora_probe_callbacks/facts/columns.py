"""What is known of each adapter tensor, in columns: one NumPy array a quantity, one entry a slot.

A check, the history and the proofs are then a few array operations over all tensors, however many there are.
Where nothing is known of a tensor a mask says so; numbers that do not exist are nan, owners that do not exist -1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_probe_callbacks.facts.words import Role

__all__ = ["Bools", "Floats", "Gradients", "History", "Ints", "Slots", "Update", "count", "indices", "mask"]

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def indices(slots: Bools | Iterable[int]) -> list[int]:
    """Slot numbers, in ascending order.

    Args:
        slots: A mask over all slots, or slot numbers in any order.

    Returns:
        The numbers as plain integers.
    """
    if isinstance(slots, np.ndarray) and slots.dtype == np.bool_:
        found: list[int] = np.flatnonzero(slots).tolist()
        return found
    return sorted(int(i) for i in slots)


def count(slots: Bools) -> int:
    """How many slots a mask holds."""
    return int(np.count_nonzero(slots))


def mask(slots: Iterable[int], size: int) -> Bools:
    """The inverse: True at the given slots.

    Args:
        slots: Slot numbers.
        size: Number of all slots.

    Returns:
        A mask, [size].
    """
    found = np.zeros(size, np.bool_)
    found[list(slots)] = True
    return found


@dataclass(frozen=True, eq=False)
class Slots:
    """The adapter tensors that are meant to train, as they are outside a forward.

    Attributes:
        name: Qualified names in the model, for people only. Names never decide.
        adapter: PEFT's adapter names.
        part: PEFT's names of the kinds of tensor: "lora_A", "lora_magnitude_vector", "modules_to_save".
        role: ``"A"`` or ``"B"`` of a low-rank pair, else ``"other"``.
        unit: Index of the unit that owns the slot.
        frozen_by_intent: Named by ``frozen=`` or by PEFT as not meant to train.
        requires_grad: Of the registered tensor.
        owner: Index of the optimizer that owns the registered tensor object, or a copy of it (``CopiesFact``); or -1.
        rate: Learning rate of its parameter group, nan without an owner or where reading it would cost a transfer.
        weight_decay: Likewise.
        half: The tensor is stored in 16 bits.
        numel: Number of elements that this rank holds.
    """

    name: tuple[str, ...]
    adapter: tuple[str, ...]
    part: tuple[str, ...]
    role: NDArray[np.str_]
    unit: Ints
    frozen_by_intent: Bools
    requires_grad: Bools
    owner: Ints
    rate: Floats
    weight_decay: Floats
    half: Bools
    numel: Ints

    def __len__(self) -> int:
        return len(self.name)

    def with_state(self, requires_grad: Bools, owner: Ints, rate: Floats, weight_decay: Floats) -> Slots:
        """The same tensors in another state; what follows from their names alone is not worked out again.

        Args:
            requires_grad: See the class.
            owner: Likewise.
            rate: Likewise.
            weight_decay: Likewise.

        Returns:
            The slots.
        """
        known = ("intended", "rows", "gates", "_roles")
        found = replace(self, requires_grad=requires_grad, owner=owner, rate=rate, weight_decay=weight_decay)
        found.__dict__.update({name: self.__dict__[name] for name in known if name in self.__dict__})
        return found

    @classmethod
    def none(cls) -> Slots:
        """No slots at all: of facts that tell of a file alone."""
        empty = np.zeros(0)
        no, number = empty.astype(np.bool_), empty.astype(np.int64)
        return cls((), (), (), empty.astype(np.str_), number, no, no, number, empty, empty, no, number)

    @cached_property
    def owned(self) -> Bools:
        """Some optimizer owns the tensor."""
        return self.owner >= 0

    @cached_property
    def intended(self) -> Bools:
        """The slots that must train: all but those meant to stay frozen."""
        return ~self.frozen_by_intent

    @cached_property
    def _roles(self) -> dict[str, Bools]:
        return {role: self.role == role for role in ("A", "B", "other")}

    @cached_property
    def rows(self) -> Bools:
        """Rows of single tokens: without a gradient as long as none of these tokens occurs."""
        return np.array([part == "trainable_tokens_delta" for part in self.part], np.bool_)

    @cached_property
    def gates(self) -> Bools:
        """AdaLoRA's diagonal between A and B, which its allocator masks."""
        return np.array([part == "lora_E" for part in self.part], np.bool_)

    def of_role(self, role: Role) -> Bools:
        """The slots of one role."""
        return self._roles[role]

    def of_adapter(self, name: str) -> Bools:
        """The slots of one adapter."""
        return np.array([adapter == name for adapter in self.adapter], np.bool_)

    def of_units(self, units: Collection[int]) -> Bools:
        """The slots that the given units own."""
        if not units:
            return np.zeros(len(self), np.bool_)
        # A layer that has left the model has a unit without slots: it may have the highest number of all.
        wanted = mask(units, 1 + max(int(self.unit.max(initial=0)), *units))
        found: Bools = wanted[self.unit]
        return found

    def names(self, slots: Bools | Iterable[int]) -> list[str]:
        """The names of some slots, in their order."""
        return [self.name[i] for i in indices(slots)]


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of the slots, each read once, when its optimizer was about to step.

    Attributes:
        read: It was looked at for this decision.
        norm: Euclidean norm, unscaled where the scale is known; nan where ``.grad`` was None or was not looked at.
        present: ``.grad`` was not None.
    """

    read: Bools
    norm: Floats
    present: Bools

    @classmethod
    def unread(cls, size: int) -> Gradients:
        """Nothing was read."""
        return cls(np.zeros(size, np.bool_), np.full(size, np.nan), np.zeros(size, np.bool_))

    @cached_property
    def missing(self) -> Bools:
        """Looked at, and None."""
        return self.read & ~self.present

    @cached_property
    def zero(self) -> Bools:
        """There, and every element exactly zero."""
        found: Bools = self.present & (self.norm == 0.0)
        return found

    @cached_property
    def broken(self) -> Bools:
        """There, and some element not finite."""
        return self.present & ~np.isfinite(self.norm)

    @cached_property
    def signal(self) -> Bools:
        """There, finite and not zero."""
        return self.present & np.isfinite(self.norm) & (self.norm > 0.0)


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one probed step, judged by the decision that follows it.

    Attributes:
        step: The step that was made.
        framework_step: Its number in the framework.
        stepped: An optimizer that stepped owns the slot, and its tensor was compared.
        start: Euclidean norm before the step; nan where it was not compared.
        size: Euclidean norm of the change, likewise.
        norm: Euclidean norm after the step, likewise.
        fraction: Elements whose bits changed, as a fraction of all, likewise.
        received: The optimizer had a gradient for it. A gradient that is not finite has the norm nan, too.
        gradient_norm: Of the gradient as the optimizer received it; nan where there was none.
    """

    step: int
    framework_step: int
    stepped: Bools
    start: Floats
    size: Floats
    norm: Floats
    fraction: Floats
    received: Bools
    gradient_norm: Floats

    @cached_property
    def moved(self) -> Bools:
        """The bits of some element changed; what is not finite counts, since nan differs from itself."""
        return self.stepped & (self.fraction > 0.0)

    @cached_property
    def mostly(self) -> Bools:
        """Those of at least half of its elements did."""
        return self.stepped & (self.fraction >= 0.5)

    @cached_property
    def broken(self) -> Bools:
        """Some element was not finite after the step."""
        return self.stepped & ~(self.norm < np.inf)


@dataclass(frozen=True, eq=False)
class History:
    """How often something was seen of each slot, over the probed steps of this session.

    Attributes:
        reads: How often its gradient was looked at.
        missing: Gradient None, in a row up to now.
        zero: Gradient exactly zero, in a row up to now.
        zero_since: The step in which that row began, while there is one.
        rate_zero: Learning rate exactly zero, in a row up to now.
        rate_rising: It was above the one before.
        unmoved: Not moved although it had a gradient and a rate, in a row up to now.
        lost: Fewer than half of its elements moved, likewise.
        put_back: A step began with the very values of the one before, which had moved it, in a row up to now.
        had_gradient: A gradient other than None was seen.
        had_signal: A gradient other than zero was seen.
        had_rate: A learning rate other than zero was seen.
        had_move: A step that moved it was seen.
        last_rate: The last learning rate that was read, nan before.
        last_start: Euclidean norm before the last update of each slot, nan before.
        last_norm: The same after it.
        frozen: Looks in a row up to now at which it did not require gradients.
        frozen_since: The step in which that row began, while there is one.
        thawed: It has been frozen and required gradients again.
        thawed_at: The step in which that was seen last.
        pruned: A gate (AdaLoRA's E) that began a step at exactly zero after a step that moved it, in a row up to now.
    """

    reads: Ints
    missing: Ints
    zero: Ints
    zero_since: Ints
    rate_zero: Ints
    rate_rising: Bools
    unmoved: Ints
    lost: Ints
    put_back: Ints
    had_gradient: Bools
    had_signal: Bools
    had_rate: Bools
    had_move: Bools
    last_rate: Floats
    last_start: Floats
    last_norm: Floats
    frozen: Ints
    frozen_since: Ints
    thawed: Bools
    thawed_at: Ints
    pruned: Ints

    def __len__(self) -> int:
        return len(self.reads)

    @classmethod
    def empty(cls, size: int) -> History:
        """Nothing was seen yet.

        Args:
            size: Number of slots.

        Returns:
            The history before the first decision.
        """
        kinds: dict[str, Any] = {"Ints": np.int64, "Bools": np.bool_}
        fields = cls.__dataclass_fields__.values()
        columns = {
            f.name: np.zeros(size, kinds[str(f.type)]) if f.type in kinds else np.full(size, np.nan) for f in fields
        }
        return cls(**columns)

    def after(self, slots: Slots, gradients: Gradients, update: Update | None, step: int) -> History:
        """Add one decision.

        Args:
            slots: The slots as they are now.
            gradients: What was read of them at this decision.
            update: What the update before it did, if there was one.
            step: The step being decided.

        Returns:
            The history with it.
        """
        moved = self if update is None else self._after_update(update, slots)
        return moved._after_gradients(slots, gradients, step)._after_freezing(slots, step)

    def _after_update(self, update: Update, slots: Slots) -> History:
        """Judged against the gradient and the rate that were read before this update."""
        stepped = update.stepped
        able = stepped & self.had_gradient & (self.zero == 0) & (self.missing == 0) & (self.rate_zero == 0)
        # Only where the last step changed the norm do equal norms mean equal values.
        again = (update.start == self.last_start) & (self.last_start != self.last_norm)
        # A gate is masked to zero after each step; that is no rollback, as long as some gate is left.
        masked = slots.gates & stepped & (update.start == 0.0) & (self.last_norm > 0.0)
        masked = masked & bool((slots.gates & stepped & (update.start > 0.0)).any())
        again = again & ~masked
        return replace(
            self,
            unmoved=_row(self.unmoved, stepped, able & ~update.moved),
            lost=_row(self.lost, stepped, able & slots.half & ~update.mostly),
            put_back=_row(self.put_back, stepped, able & again),
            pruned=_row(self.pruned, stepped & slots.gates, masked),
            had_move=self.had_move | update.moved,
            last_start=np.where(stepped, update.start, self.last_start),
            last_norm=np.where(stepped, update.norm, self.last_norm),
        )

    def _after_gradients(self, slots: Slots, gradients: Gradients, step: int) -> History:
        read = gradients.read
        if not read.any():
            return self
        known = read & ~np.isnan(slots.rate)
        owned = read & slots.owned
        zero = read & gradients.zero
        return replace(
            self,
            reads=self.reads + read,
            missing=_row(self.missing, read, ~gradients.present),
            zero=_row(self.zero, read, gradients.zero),
            zero_since=np.where(zero & (self.zero == 0), step, np.where(read & ~zero, 0, self.zero_since)),
            rate_zero=_row(self.rate_zero, owned, slots.rate == 0.0),
            rate_rising=np.where(read, known & (slots.rate > self.last_rate), self.rate_rising),
            had_gradient=self.had_gradient | gradients.present,
            had_signal=self.had_signal | (gradients.present & ~gradients.zero),
            had_rate=self.had_rate | (owned & (slots.rate != 0.0)),
            last_rate=np.where(known, slots.rate, self.last_rate),
        )

    def _after_freezing(self, slots: Slots, step: int) -> History:
        frozen = ~slots.requires_grad
        if not (frozen.any() or self.frozen.any()):
            return self
        back = ~frozen & (self.frozen > 0)
        return replace(
            self,
            frozen=np.where(frozen, self.frozen + 1, 0),
            frozen_since=np.where(frozen & (self.frozen == 0), step, np.where(frozen, self.frozen_since, 0)),
            thawed=self.thawed | back,
            thawed_at=np.where(back, step, self.thawed_at),
        )


def _row(before: Ints, looked: Bools, seen: Bools) -> Ints:
    """How often in a row: one more where it was seen, none where it was looked for and not seen."""
    return np.where(looked, np.where(seen, before + 1, 0), before)
