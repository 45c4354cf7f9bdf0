"""The gradients of the adapter tensors, as the optimizer is about to receive them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lora_probe_callbacks.observe.facts import GradientFact
from lora_probe_callbacks.observe.readout import Readout, local

__all__ = ["GradientReading", "read_gradients"]


@dataclass(eq=False, slots=True)
class GradientReading:
    """Gradients on their way to the host."""

    slots: list[int]  # slots asked for
    present: list[int]  # those with a gradient, in the order of the ticket
    size: range

    def facts(self, readout: Readout) -> dict[int, GradientFact]:
        """Slot to its gradient, once the readout was fetched."""
        missing = GradientFact(present=False, norm=0.0, zero=False, finite=True)
        facts = dict.fromkeys(self.slots, missing)
        for slot, size in zip(self.present, readout.get(self.size), strict=True):
            facts[slot] = GradientFact(True, size, size == 0.0, math.isfinite(size))
        return facts

    def norms(self, readout: Readout) -> dict[int, float]:
        """Slot to its norm, for those with a gradient."""
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
    return GradientReading(slots=slots, present=list(grads), size=readout.add_norms(values, 2, scale))
