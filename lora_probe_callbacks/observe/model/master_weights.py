"""Copies that an optimizer steps in the place of the adapter: does anything feed them, and write them back?

A loop with mixed precision of its own (or with an optimizer on another device) gives the optimizer float32 copies,
copies the gradients to them before the step and the values back after it. An optimizer that was built on a deep copy
of the model, or before a load with ``assign=True``, looks the same when training begins. What happens in the
steps tells them apart.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lora_probe_callbacks.facts import CopiesFact, Floats
from lora_probe_callbacks.observe.device.transfer import Readout
from lora_probe_callbacks.observe.device.updates import Fingerprints
from lora_probe_callbacks.observe.model.wrappers import is_shard

__all__ = ["Copies", "find_copies"]


class Copies:
    """What became of adapter tensors and of the copies that an optimizer steps for them.

    Args:
        tensors: Slot to the adapter's own tensor.
        copies: Slot to its copy, which may be a view into a flat one.
        holders: Slot to what the optimizer holds: the copy, or the flat tensor.
    """

    def __init__(
        self,
        tensors: Mapping[int, torch.Tensor],
        copies: Mapping[int, torch.Tensor],
        holders: Mapping[int, torch.Tensor],
    ) -> None:
        self.tensors, self.holders = dict(tensors), dict(holders)
        self._live = Fingerprints({str(slot): tensor for slot, tensor in tensors.items()})
        self._stepped = Fingerprints({str(slot): copy for slot, copy in copies.items()})
        self._followed = False
        self._still = 0
        self._starved: tuple[int, int] | None = None

    def read(self, readout: Readout) -> range:
        """Put the norms of both into ``readout``."""
        first, last = self._live.read(readout), self._stepped.read(readout)
        return range(first.start, last.stop)

    def advance(self, values: Floats) -> None:
        """Take in one look: before a step, after what the loop did since the last one."""
        size = self._live.size
        moved, stepped = self._live.changed(values[:size]), self._stepped.changed(values[size:])
        if moved:
            self._followed, self._still, self._starved = True, 0, None
        elif stepped:
            self._still += 1

    def stepped(self, step: int, framework_step: int) -> None:
        """An optimizer that holds the copies has stepped: had they a gradient?"""
        fed = any(holder.grad is not None for holder in self.holders.values())
        made = any(tensor.grad is not None for tensor in self.tensors.values())
        if made and not fed and self._starved is None and not self._followed:
            self._starved = (step, framework_step)

    def fact(self) -> CopiesFact:
        """What the check may know."""
        return CopiesFact(frozenset(self.tensors), self._followed, self._still, self._starved)


@torch.no_grad()
def find_copies(
    lost: Mapping[int, torch.Tensor], foreign: Sequence[torch.Tensor], trainable: Sequence[torch.Tensor]
) -> Copies | None:
    """Look in an optimizer for copies of all tensors that it does not own.

    Args:
        lost: Slot to an adapter tensor that no optimizer holds.
        foreign: Tensors of the optimizers that belong to no watched module.
        trainable: All tensors of the model that require gradients, in its order: how flat copies are made.

    Returns:
        The copies; None if a single tensor has none of its shape and values in at least its precision.
    """
    views = [(tensor, tensor) for tensor in foreign if not is_shard(tensor)]
    views += [(view, tensor) for tensor in foreign for view in _parts(tensor, trainable)]
    copies, holders = {}, {}
    for slot, tensor in lost.items():
        if is_shard(tensor):
            return None
        place = next((i for i, (view, _) in enumerate(views) if _is_copy(view, tensor)), None)
        if place is None:
            return None
        copies[slot], holders[slot] = views.pop(place)
    same = [h for slot, h in holders.items() if h.dtype == lost[slot].dtype and h.device == lost[slot].device]
    if not copies or _in_a_module(same):
        return None
    return Copies(lost, copies, holders)


def _is_copy(copy: torch.Tensor, tensor: torch.Tensor) -> bool:
    return (
        copy.shape == tensor.shape
        and copy.is_floating_point()
        and copy.element_size() >= tensor.element_size()
        and torch.equal(copy.to(tensor.device, tensor.dtype), tensor)
    )


def _parts(flat: torch.Tensor, trainable: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A flat tensor, cut as the model's trainable tensors are; nothing if it is too short for them."""
    sizes = [t.numel() for t in trainable]
    if flat.ndim != 1 or len(sizes) < 2 or not sum(sizes) <= flat.numel() < 2 * sum(sizes):
        return []
    cut = torch.split(flat.detach()[: sum(sizes)], sizes)
    return [part.view(t.shape) for part, t in zip(cut, trainable, strict=True)]


def _in_a_module(tensors: Sequence[torch.Tensor]) -> bool:
    """Some tensor is a parameter of a living module: of another model, then. As slow as a walk over all objects."""
    ids = {id(t) for t in tensors}
    return bool(ids) and any(
        id(p) in ids
        for thing in gc.get_objects()
        if issubclass(type(thing), nn.Module)
        for p in thing.__dict__.get("_parameters", {}).values()
    )
