"""The gradients of the adapter tensors, as the optimizer is about to receive them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from lora_probe_callbacks.facts import Floats, Gradients, Ints
from lora_probe_callbacks.observe.device.batching import Held
from lora_probe_callbacks.observe.device.transfer import Readout

__all__ = ["GradientReading", "gradients_of", "read_gradients"]


@dataclass(eq=False, slots=True)
class GradientReading:
    """Gradients on their way to the host."""

    slots: Ints  # slots asked for
    present: Ints  # those with a gradient, in the order of the ticket
    size: range

    def norms(self, readout: Readout, column: Floats) -> None:
        """Enter the norms into a column, nan where there is no gradient; once the readout was received."""
        column[self.slots] = np.nan
        column[self.present] = readout.get(self.size)


def read_gradients(held: Held, readout: Readout, scale: torch.Tensor | None) -> GradientReading:
    """Put the norm of every gradient into ``readout``.

    Args:
        held: The slots.
        readout: Where the values travel.
        scale: What the loss was multiplied with, where the optimizer itself undoes that.

    Returns:
        A reading that yields norms after ``readout.receive()``.
    """
    present, rows = held.gradients()
    return GradientReading(held.slots, present, readout.add_row_norms(rows, 2, scale))


def gradients_of(readings: Iterable[GradientReading], readout: Readout, size: int) -> Gradients:
    """Put readings together; the last word counts: what had a gradient may have none by now.

    Args:
        readings: In their order.
        readout: Received.
        size: Number of slots.

    Returns:
        The columns.
    """
    read, present, norm = np.zeros(size, np.bool_), np.zeros(size, np.bool_), np.full(size, np.nan)
    for reading in readings:
        read[reading.slots] = True
        present[reading.slots] = False
        present[reading.present] = True
        reading.norms(readout, norm)
    return Gradients(read, norm, present)
