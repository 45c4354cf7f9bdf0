"""What did not run: which part around an adapted layer was left out, and who ran in its place."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_probe_callbacks.observe.model.inventory import Inventory, Unit

__all__ = ["AdaptersElsewhere", "adapters_alive", "idle_part"]


def idle_part(unit: Unit, called: set[int], inventory: Inventory) -> Literal["layer", "branch", "sibling"] | None:
    """Find the largest part around a layer that did not run although what holds it did.

    Args:
        unit: The unit whose layer may have been left out.
        called: Ids of the watched modules that ran in the training forwards.
        inventory: All adapted layers.

    Returns:
        ``"layer"`` if it is the adapted layer itself, ``"sibling"`` if it stands in a list of modules
        of which others ran, ``"branch"`` if it is larger, None if the layer ran.
    """
    if id(unit.layer.called) in called:
        return None
    touched = set(called)
    for layer in inventory.layers:
        if id(layer.called) in called:
            touched.update(id(m) for m in layer.chain)
    for _, module, _ in inventory.ancestors:
        if id(module) in called:
            touched.update(id(m) for m, inner in _pairs(inventory) if inner is module)
    chain = [*unit.layer.chain, unit.layer.module]
    for holder, part in zip(reversed(chain[:-1]), reversed(chain[1:]), strict=True):
        if id(holder) in touched:
            if part is not unit.layer.module:
                return "branch"
            return "sibling" if isinstance(holder, nn.ModuleList | nn.ModuleDict) else "layer"
    return "branch"


def _pairs(inventory: Inventory) -> list[tuple[nn.Module, nn.Module]]:
    """(module, a watched module anywhere below it)."""
    return [
        (upper, lower) for layer in inventory.layers for i, lower in enumerate(layer.chain) for upper in layer.chain[:i]
    ]


class AdaptersElsewhere:
    """Finds adapted layers outside the watched modules whose gradients grow from one look to the next.

    A walk over all live objects: slow (tenths of a second), asked for only when the optimizer's model
    was not called and its adapter has no gradient at all, and a few times at most. One look alone
    proves nothing: a model that was trained earlier in the same process keeps its gradients.
    """

    _MOST = 4

    def __init__(self) -> None:
        self._last: dict[int, int] | None = None
        self._looks = 0

    def look(self, known: Sequence[nn.Module]) -> tuple[str, ...]:
        """Look once.

        Args:
            known: The layers that are watched.

        Returns:
            A description for each kind of layer that received gradients since the last look.
        """
        if self._looks == self._MOST:
            return ()
        self._looks += 1
        ids = {id(module) for module in known}
        now: dict[int, int] = {}
        found: dict[str, int] = {}
        last = self._last
        for thing in gc.get_objects():
            if issubclass(type(thing), BaseTunerLayer) and id(thing) not in ids:
                for tensor in thing.parameters():
                    if tensor.grad is None:
                        continue
                    now[id(tensor)] = tensor.grad._version
                    if last is not None and last.get(id(tensor)) != tensor.grad._version:
                        kind = f"another model's {type(thing).__name__} layers"
                        found[kind] = found.get(kind, 0) + 1
        self._last = now
        return tuple(f"{kind} ({count} adapter tensors with new gradients)" for kind, count in found.items())


def adapters_alive(known: Sequence[nn.Module]) -> tuple[str, ...]:
    """Find adapted layers outside the watched modules. As slow as the walk above.

    Args:
        known: The layers that are watched.

    Returns:
        A description for each kind of layer.
    """
    ids = {id(module) for module in known}
    found: dict[str, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), BaseTunerLayer) and id(thing) not in ids:
            found[type(thing).__name__] = found.get(type(thing).__name__, 0) + 1
    return tuple(f"another model's {count} {kind} layers" for kind, count in found.items())
