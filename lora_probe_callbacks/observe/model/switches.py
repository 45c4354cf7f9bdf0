"""In which state the adapted layers are, of all of them together: disabled, merged, which adapter is active.

Asked three times a step, and of every layer that is called, while the state hardly ever moves: the switches are
compared with those of the last look, and what follows from them is worked out only where they differ.
"""

from __future__ import annotations

from operator import attrgetter, itemgetter
from typing import Any

from lora_probe_callbacks.facts import Mode
from lora_probe_callbacks.observe.model.inventory import Inventory, Unit

__all__ = ["Switches"]

_NAMES = ("_disable_adapters", "_active_adapter", "merged_adapters")  # see AdaptedLayer.plain
_of_module, _of_layer = itemgetter(*_NAMES), attrgetter("disabled", "active", "merged")


class Switches:
    """The switches of the adapted layers of a model.

    Args:
        inventory: The layers.
        units: The units whose state is wanted.
    """

    def __init__(self, inventory: Inventory, units: list[Unit]) -> None:
        self._inventory, self._units = inventory, units
        # Where these are attributes of the module, and nothing else: its dictionary, which is read without the module.
        read = {
            id(x): vars(x.module)
            for x in inventory.layers
            if x.tuner and x.plain and set(_NAMES) <= vars(x.module).keys()
        }
        self._attributes = list(read.values())
        self._others = [layer for layer in inventory.layers if id(layer) not in read]
        self._attributes_of = [read.get(id(unit.layer)) for unit in units]
        self._seen: list[list[Any]] = []
        self._state: tuple[tuple[Mode, ...], tuple[str, ...]] = ((), ())
        self._merged = False
        self._known: list[Any] = [None] * len(units)

    def state(self) -> tuple[tuple[Mode, ...], tuple[str, ...]]:
        """The state of every unit at this moment, and the names of the active adapters of all layers."""
        self._look()
        return self._state

    @property
    def merged(self) -> bool:
        """Some adapter is merged into some layer."""
        self._look()
        return self._merged

    def mode(self, unit: int) -> Mode:
        """The state of one unit at this moment."""
        attributes = self._attributes_of[unit]
        if attributes is not None and _of_module(attributes) == self._known[unit]:
            return self._state[0][unit]
        return self._units[unit].layer.mode(self._units[unit].adapter)

    def _look(self) -> None:
        now = [list(map(_of_module, self._attributes)), list(map(_of_layer, self._others))]
        if now == self._seen:
            return
        self._seen = [[tuple(map(_kept, switches)) for switches in some] for some in now]
        self._state = tuple(unit.layer.mode(unit.adapter) for unit in self._units), self._inventory.active
        self._merged = any(layer.merged for layer in self._inventory.layers)
        known = dict(zip(map(id, self._attributes), self._seen[0], strict=True))
        self._known = [known.get(id(attributes)) for attributes in self._attributes_of]


def _kept(switch: object) -> object:
    """PEFT changes its lists in place."""
    return list(switch) if isinstance(switch, list) else switch
