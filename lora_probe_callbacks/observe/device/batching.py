"""The tensors of some slots in the order in which they are put together for reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch

from lora_probe_callbacks.facts import Floats, Ints
from lora_probe_callbacks.observe.device.transfer import PLAIN, Grouping, batches, group, local

__all__ = ["Held", "held"]

_grad = attrgetter("grad")


@dataclass(frozen=True, slots=True)
class Held:
    """What this rank holds of some slots; grouped once, and read several times around a step.

    Attributes:
        slots: The slots of which it holds an element.
        tensors: Their registered tensors.
        grouping: Of what it holds of them; slots and tensors stand in its order.
        plain: It holds all of each: none is in shards.
        sizes: Numbers of elements of what it holds.
    """

    slots: Ints
    tensors: Sequence[torch.Tensor]
    grouping: Grouping
    plain: bool
    sizes: Floats

    def values(self) -> list[torch.Tensor]:
        """What this rank holds of each. For use under ``no_grad``."""
        return list(self.tensors) if self.plain else list(map(local, self.tensors))

    def rows(self) -> list[torch.Tensor]:
        """The values put together."""
        return batches(self.values(), self.grouping)

    def gradients(self) -> tuple[Ints, list[torch.Tensor]]:
        """Slots with a gradient, and their gradients put together in that order."""
        grads = list(map(_grad, self.tensors))
        if set(map(type, grads)) == {torch.Tensor}:  # as a rule
            with suppress(RuntimeError):  # some are sparse, or of another shape than what their tensor holds by now
                rows = batches(grads, self.grouping)
                if all(part.layout is torch.strided for part in rows):
                    return self.slots, rows
        there = [(slot, local(_dense(g))) for slot, g in zip(self.slots, grads, strict=True) if g is not None]
        grouping = group([g for _, g in there])
        ordered = [there[i] for i in grouping.order]
        return np.array([slot for slot, _ in ordered], np.int64), batches([g for _, g in ordered], grouping)


def held(tensors: Mapping[int, torch.Tensor]) -> Held:
    """Group the tensors of slots.

    Args:
        tensors: Slot to its registered tensor.

    Returns:
        Those of which this rank holds an element: it may hold no row of a short one.
    """
    there = [(slot, tensor, mine) for slot, tensor in tensors.items() if (mine := local(tensor)).numel()]
    grouping = group([mine for _, _, mine in there])
    ordered = [there[i] for i in grouping.order]
    return Held(
        slots=np.array([slot for slot, _, _ in ordered], np.int64),
        tensors=[tensor for _, tensor, _ in ordered],
        grouping=grouping,
        plain=all(type(tensor) in PLAIN for _, tensor, _ in ordered),
        sizes=np.array([shape.numel() for _, _, shape in grouping.kinds], np.float64),
    )


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
