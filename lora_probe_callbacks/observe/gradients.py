"""The gradients of the adapter tensors, as the optimizer is about to receive them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lora_probe_callbacks.observe.facts import GradientFact
from lora_probe_callbacks.observe.readout import Readout, batches, group, local

__all__ = ["GradientReading", "gradient_fact", "read_gradients"]


@dataclass(eq=False, slots=True)
class GradientReading:
    """Gradients on their way to the host."""

    slots: list[int]  # slots asked for
    present: list[int]  # those with a gradient, in the order of the ticket
    size: range

    def norms(self, readout: Readout) -> dict[int, float]:
        """Slot to its norm, for those with a gradient, once the readout was received."""
        return dict(zip(self.present, readout.get(self.size), strict=True))


def read_gradients(
    tensors: Mapping[int, torch.Tensor], readout: Readout, scale: torch.Tensor | None
) -> GradientReading:
    """Put the norm of every gradient into ``readout``.

    Args:
        tensors: Slot to its registered tensor.
        readout: Where the values travel.
        scale: What the loss was multiplied with, where the optimizer itself undoes that.

    Returns:
        A reading that yields facts after ``readout.receive()``.
    """
    slots = [slot for slot, t in tensors.items() if local(t).numel()]  # a rank may hold no row of a short tensor
    grads = {slot: g for slot in slots if (g := tensors[slot].grad) is not None}
    values = [local(g if not g.is_sparse else g.coalesce().values()) for g in grads.values()]
    groups = group(values)
    present = list(grads)
    return GradientReading(
        slots=slots,
        present=[present[i] for i in groups.order],
        size=readout.add_row_norms(batches(values, groups.together), 2, scale),
    )


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
