"""The gradients of the adapter tensors, as the optimizer is about to receive them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_probe_callbacks.facts import GradientFact
from lora_probe_callbacks.observe.device.batching import Held
from lora_probe_callbacks.observe.device.transfer import Readout

__all__ = ["GradientReading", "gradient_fact", "read_gradients"]


@dataclass(eq=False, slots=True)
class GradientReading:
    """Gradients on their way to the host."""

    slots: Sequence[int]  # slots asked for
    present: Sequence[int]  # those with a gradient, in the order of the ticket
    size: range

    def norms(self, readout: Readout) -> dict[int, float]:
        """Slot to its norm, for those with a gradient, once the readout was received."""
        return dict(zip(self.present, readout.get(self.size), strict=True))


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


def gradient_fact(norm: float | None) -> GradientFact:
    """The kind of a gradient.

    Args:
        norm: Its Euclidean norm; None where there is none.

    Returns:
        One of four objects, so that equal ones are compared quickly.
    """
    if norm is None:
        return _NONE
    return _SIGNAL if 0.0 < norm < math.inf else _ZERO if norm == 0.0 else _NOT_FINITE


_NONE = GradientFact(present=False, zero=False, finite=True)
_SIGNAL = GradientFact(present=True, zero=False, finite=True)
_ZERO = GradientFact(present=True, zero=True, finite=True)
_NOT_FINITE = GradientFact(present=True, zero=False, finite=False)
