"""A few elements of each adapter tensor, beside its norm: where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lora_probe_callbacks.facts import Bools, Ints
from lora_probe_callbacks.facts.path import FEW, Look
from lora_probe_callbacks.observe.device.transfer import Readout

__all__ = ["PositionReading", "read_position"]


@dataclass(eq=False, slots=True)
class PositionReading:
    """Where some slots stand, on its way to the host."""

    step: int
    after: bool
    next: bool
    slots: Ints
    there: Bools | slice  # of the slots: those whose tensor is still there, in its shape
    readout: Readout  # which may travel before that of the decision
    norm: range
    few: list[tuple[torch.Size, range]]

    def look(self, size: int) -> Look:
        """The columns, once the readout was received.

        Args:
            size: Number of slots.

        Returns:
            The look.
        """
        known, norm, few = np.zeros(size, np.bool_), np.full(size, np.nan), np.zeros((size, FEW))
        rows = np.zeros((len(self.slots), FEW))
        first = 0
        for (count, width), ticket in self.few:
            rows[first : first + count, :width] = self.readout.get(ticket).reshape(count, width)
            first += count
        slots = self.slots[self.there]
        known[slots] = True
        norm[slots] = self.readout.get(self.norm)[self.there]
        few[slots] = rows[self.there]
        return Look(self.step, self.after, known, norm, few, self.next)


def read_position(
    slots: Ints,
    there: Bools | slice,
    rows: Sequence[torch.Tensor],
    norm: range,
    readout: Readout,
    *,
    step: int,
    after: bool,
    next_step: bool = True,
) -> PositionReading:
    """Put a few elements of every row into ``readout``.

    Args:
        slots: Of the rows, in their order.
        there: Those of the slots whose tensor is still there, in its shape.
        rows: Tensors whose first dimension counts slots.
        norm: Where their norms will be found.
        readout: Where the values travel.
        step: The step that comes, or was made.
        after: It was made.
        next_step: The optimizer has made no step since the last reading after one.

    Returns:
        A reading that yields a look after ``readout.receive()``.
    """
    return PositionReading(step, after, next_step, slots, there, readout, norm, readout.add_row_elements(rows, FEW))
