"""Buffers and small frozen parameters: does training itself change them, without an optimizer?

Batch normalisation keeps running statistics, a router its bias, a quantiser its scales. The file of an adapter holds
none of them, unless they are parts of a saved module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from lora_probe_callbacks.facts import Floats
from lora_probe_callbacks.observe.device.transfer import Readout, batches, group, kind, local
from lora_probe_callbacks.observe.model.ownership import tensors_of
from lora_probe_callbacks.observe.model.targets import Targets

__all__ = ["FrozenState"]

_MOST = 512  # tensors, evenly spread
_FEW = 64  # elements of each
_SMALL = 2**16  # elements of a parameter that may hold a state; weights are larger
_ROUNDING = 1e-6
_PEFT = "base_model.model."


class _Place(NamedTuple):
    name: str  # as an adapter's file would call it
    module: nn.Module
    attribute: str

    @property
    def tensor(self) -> torch.Tensor | None:
        found = self.module._buffers.get(self.attribute)
        return found if found is not None else self.module._parameters.get(self.attribute)


class FrozenState:
    """A few elements of what nobody trains and no adapter file holds, as they were at the start.

    Quiet by what they are: buffers that are not saved with a model, whole numbers and single numbers (counters), and
    what is called a cache.

    Args:
        targets: What is expected to train.
    """

    @torch.no_grad()
    def __init__(self, targets: Targets) -> None:
        places = [p for p in _places(targets) if _at_hand(p) is not None]
        self._places = places[:: max(1, math.ceil(len(places) / _MOST))]
        self._start = [_few(p).clone() for p in self._places]
        self._counters: set[int] = set()
        self.moved: tuple[tuple[str, float], ...] = ()

    @torch.no_grad()
    def read(self, readout: Readout) -> range | None:
        """Put the norms of the changes, and of the start, into ``readout``."""
        if not self._places:
            return None
        now = list(map(_few, self._places))
        for i, values in enumerate(now):
            if kind(values) != kind(self._start[i]):  # moved to a device, or made in another size: a new beginning
                self._start[i] = values.clone()
        grouping = group(self._start)
        pairs = [[few[i] for i in grouping.order] for few in (now, self._start)]
        rows, start = (batches(few, grouping) for few in pairs)
        self._order = grouping.order
        first = readout.add_row_norms([a.float() - b.float() for a, b in zip(rows, start, strict=True)], 2)
        second = readout.add_row_norms(start, 2)
        return range(first.start, second.stop)

    def advance(self, values: Floats) -> None:
        """Note what has moved, once the readout was received."""
        half = len(self._order)
        found = {}
        for i, change, size in zip(self._order, values[:half], values[half:], strict=True):
            if change > _ROUNDING * size and not self._counts(i):
                found[i] = (self._places[i].name, float(change / size) if size else float("inf"))
        self.moved = tuple(found[i] for i in sorted(found))

    def now(self) -> tuple[tuple[str, float], ...]:
        """What has moved up to this moment: a transfer of its own, for a look by hand."""
        readout = Readout()
        ticket = self.read(readout)
        if ticket is not None:
            readout.send()
            readout.receive()
            self.advance(readout.get(ticket))
        return self.moved

    @torch.no_grad()
    def _counts(self, i: int) -> bool:
        """It holds whole numbers. Asked of what has moved: as a rule nothing has."""
        if i not in self._counters:
            values = _few(self._places[i]).float()
            if torch.equal(values, values.round()):
                self._counters.add(i)
        return i in self._counters


def _places(targets: Targets) -> Iterator[_Place]:
    known = {id(t) for unit in targets.inventory.units for s in unit.slots if (t := s.tensor) is not None}
    known |= {id(t) for t in tensors_of(targets.optimizers)}
    known |= {id(w) for layer in targets.inventory.layers if (w := layer.base_weight) is not None}
    for top in _tops(targets):
        prefix = "" if isinstance(top, PeftModel | PeftMixedModel) else _PEFT
        of_adapters = set(_of_adapters(targets))
        for path, module in top.named_modules():
            if id(module) in of_adapters:
                continue
            for name in _names(module, known):
                yield _Place(f"{prefix}{path}.{name}" if path else f"{prefix}{name}", module, name)


def _of_adapters(targets: Targets) -> Iterator[int]:
    """Ids of the modules that belong to an adapter: a file holds what PEFT wants to be in it."""
    for layer in targets.inventory.layers:
        module = layer.module
        if isinstance(module, ModulesToSaveWrapper):
            yield from map(id, module.modules_to_save.modules())
        elif isinstance(module, BaseTunerLayer):
            yield id(module)
            own = (child for name, child in module.named_children() if name != "base_layer")
            yield from (id(m) for child in own for m in child.modules())


def _tops(targets: Targets) -> list[nn.Module]:
    """The modules that would be saved."""
    found: dict[int, nn.Module] = {}
    for unit in targets.units:
        above = (*unit.layer.chain, unit.layer.module)
        peft = (m for m in above if isinstance(m, PeftModel | PeftMixedModel))
        native = (m for m in above if isinstance(getattr(m, "peft_config", None), dict))
        top = next(peft, None) or next(native, None)
        if top is not None:
            found[id(top)] = top
    return list(found.values())


def _names(module: nn.Module, known: set[int]) -> Iterator[str]:
    for name, buffer in module._buffers.items():
        persistent = name not in module._non_persistent_buffers_set and "cache" not in name
        if buffer is not None and persistent and buffer.is_floating_point() and buffer.dim():
            yield name
    for name, tensor in module._parameters.items():
        if tensor is None or id(tensor) in known or tensor.requires_grad or not tensor.is_floating_point():
            continue
        if tensor.dim() and tensor.numel() <= _SMALL:
            yield name


def _at_hand(place: _Place) -> torch.Tensor | None:
    tensor = place.tensor
    if tensor is None or tensor.device.type == "meta":
        return None
    mine = local(tensor)
    return mine if mine.numel() and mine.untyped_storage().size() else None


def _few(place: _Place) -> torch.Tensor:
    mine = _at_hand(place)
    if mine is None:
        return torch.empty(0)
    stride = max(1, mine.numel() // _FEW)
    return mine.reshape(-1)[: stride * _FEW : stride]
