"""The tensors of some slots in the order in which they are put together for reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_probe_callbacks.observe.device.transfer import Grouping, batches, group, kind, local

__all__ = ["Held", "held"]


@dataclass(frozen=True, slots=True)
class Held:
    """What this rank holds of some slots; grouped once, and read several times around a step.

    Attributes:
        slots: The slots of which it holds an element.
        tensors: Their registered tensors.
        grouping: Of what it holds of them; slots and tensors stand in its order.
        empty: Tensors of which it holds no element.
    """

    slots: Sequence[int]
    tensors: Sequence[torch.Tensor]
    grouping: Grouping
    empty: Sequence[torch.Tensor] = ()

    def values(self) -> list[torch.Tensor]:
        """What this rank holds of each. For use under ``no_grad``."""
        return list(map(local, self.tensors))

    def fits(self) -> bool:
        """The tensors are of the kinds that were grouped: an assignment to ``.data`` may have changed them."""
        return list(map(kind, self.values())) == self.grouping.kinds and not any(local(t).numel() for t in self.empty)

    def rows(self) -> list[torch.Tensor]:
        """The values put together."""
        return batches(self.values(), self.grouping)

    def gradients(self) -> tuple[Sequence[int], list[torch.Tensor]]:
        """Slots with a gradient, and their gradients put together in that order."""
        grads = [tensor.grad for tensor in self.tensors]
        if all(type(g) is torch.Tensor and g.layout is torch.strided for g in grads):
            plain: list[torch.Tensor] = grads  # type: ignore[assignment]
            if [g.shape for g in plain] == [shape for _, _, shape in self.grouping.kinds]:  # as a rule
                return self.slots, batches(plain, self.grouping)
        there = [(slot, local(_dense(g))) for slot, g in zip(self.slots, grads, strict=True) if g is not None]
        grouping = group([g for _, g in there])
        ordered = [there[i] for i in grouping.order]
        return [slot for slot, _ in ordered], batches([g for _, g in ordered], grouping)


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
        slots=[slot for slot, _, _ in ordered],
        tensors=[tensor for _, tensor, _ in ordered],
        grouping=grouping,
        empty=[tensor for tensor in tensors.values() if not local(tensor).numel()],
    )


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
