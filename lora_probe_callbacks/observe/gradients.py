"""The gradients of the adapter tensors, as the optimizer is about to receive them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lora_probe_callbacks.observe.facts import GradientFact
from lora_probe_callbacks.observe.readout import Readout, local, norms

__all__ = ["GradientReading", "read_gradients"]


@dataclass(eq=False, slots=True)
class GradientReading:
    """Gradients on their way to the host."""

    slots: list[int]  # slots asked for
    present: list[int]  # those with a gradient, in the order of the tickets
    size: range | None
    largest: range | None

    def facts(self, readout: Readout) -> dict[int, GradientFact]:
        """Slot to its gradient, once the readout was fetched."""
        missing = GradientFact(present=False, norm=0.0, zero=False, finite=True)
        facts = dict.fromkeys(self.slots, missing)
        if self.size is not None and self.largest is not None:
            rows = zip(self.present, readout.get(self.size), readout.get(self.largest), strict=True)
            for slot, size, largest in rows:
                # The sum of squares of a finite gradient may overflow; a NaN never hides in it.
                finite = math.isfinite(largest) and not math.isnan(size)
                facts[slot] = GradientFact(present=True, norm=size, zero=largest == 0.0, finite=finite)
        return facts


def read_gradients(
    tensors: Mapping[int, torch.Tensor], readout: Readout, scale: torch.Tensor | None
) -> GradientReading:
    """Put norm and largest element of every gradient into ``readout``.

    Args:
        tensors: Slot to its registered tensor.
        readout: Where the values travel.
        scale: What the loss was multiplied with, where the optimizer itself undoes that.

    Returns:
        A reading that yields facts after ``readout.fetch()``.
    """
    tensors = {slot: t for slot, t in tensors.items() if local(t).numel()}  # a rank may hold no row of a short tensor
    grads = {slot: t.grad for slot, t in tensors.items() if t.grad is not None}
    present = list(grads)
    if not present:
        return GradientReading(list(tensors), [], None, None)
    values = [local(g if not g.is_sparse else g.coalesce().values()) for g in grads.values() if g is not None]
    sizes = norms(values, 2)
    return GradientReading(
        slots=list(tensors),
        present=present,
        size=readout.add(sizes if scale is None else sizes / scale.to(sizes.device)),
        largest=readout.add(norms(values, math.inf)),
    )
