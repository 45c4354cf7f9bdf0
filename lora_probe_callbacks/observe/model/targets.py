"""What is meant to train: the expected adapters, their layers and their tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from lora_probe_callbacks.observe.model.inventory import AdaptedLayer, Inventory, Slot, Unit, take_inventory
from lora_probe_callbacks.observe.model.ownership import owner_of
from lora_probe_callbacks.observe.model.places import Links, Places
from lora_probe_callbacks.observe.model.wrappers import is_flat, sharded_modules, shards_behind

if TYPE_CHECKING:
    from lora_probe_callbacks.config import ProbeConfig

__all__ = ["NotJudgedError", "Targets"]


class NotJudgedError(ValueError):
    """What trains lies in no slot: tensors poured into flat parameters, or a tuner without tuner layers."""


class Targets:
    """The expected units and slots of a model.

    Args:
        roots: (name, module) pairs that hold what is trained.
        optimizers: Torch optimizers.
        config: The names that were declared, as far as any were.

    Raises:
        ValueError: If there is no adapter, a name that does not exist, or no way to choose.
    """

    def __init__(
        self, roots: Sequence[tuple[str, nn.Module]], optimizers: Sequence[Optimizer], config: ProbeConfig
    ) -> None:
        self.roots = roots
        self.optimizers = optimizers
        self.config = config
        self._know(take_inventory(roots))
        self._check_names()
        self._find_shards()
        self.left: dict[str, torch.Tensor] = {}  # what layers held that are no longer there
        self.expect(self.active_names())

    def _know(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self._in_place = Links(_ways(inventory))

    # --- what is meant ----------------------------------------------------------------------

    def _check_names(self) -> None:
        inventory = self.inventory
        if inventory.out_of_reach:
            raise NotJudgedError(
                f"{inventory.out_of_reach[0]} trains tensors that lie in no tuner layer of PEFT; LoRA, and what has "
                "tuner layers like it, can be judged"
            )
        if not inventory.units and not inventory.unloaded:
            if any(is_flat(p) for _, root in self.roots for p in root.parameters()):
                raise NotJudgedError(
                    "the adapter is part of flat parameters of FullyShardedDataParallel, in which no tensor of it "
                    "can be told apart: pass use_orig_params=True"
                )
            if foreign := _lora_of_others(self.roots):
                raise NotJudgedError(
                    f"{foreign} is LoRA of its own, not of PEFT (torchtune has such layers); tuner layers of PEFT "
                    "can be judged"
                )
            names = ", ".join(f"{name or 'the model'} ({type(module).__name__})" for name, module in self.roots)
            raise ValueError(
                f"found no PEFT adapter in {names}; expected a PeftModel or a model with add_adapter(): attach the "
                "adapter before training starts (a model that was merged and unloaded has none left)"
            )
        config = self.config
        asked: dict[str, Sequence[str]] = {
            "adapter": config.names or (),
            "reference_adapters": config.reference_adapters,
            "lagged_adapters": config.lagged_adapters,
        }
        for argument, wanted in asked.items():
            unknown = [name for name in wanted if name not in inventory.adapters]
            if unknown and not inventory.unloaded:
                raise ValueError(f"{argument} got {unknown}, expected names among {inventory.adapters}")

    def active_names(self) -> tuple[str, ...]:
        """The adapters that must train: as declared, else those active now that are no reference."""
        if self.config.names is not None:
            return self.config.names
        aside = {*self.config.reference_adapters, *self.config.lagged_adapters}
        active = tuple(name for name in self.inventory.active if name not in aside)
        tenants = tuple(name for name in self._tenants(active) if name not in aside)
        return active + tenants or tuple(name for name in self.inventory.adapters if name not in aside)

    def _tenants(self, active: Sequence[str]) -> list[str]:
        """Adapters with an optimizer of their own, which owns nothing of those that are active: they take turns."""
        owners = owner_of(self.optimizers) if active and len(self.optimizers) > 1 else {}
        by_optimizer: dict[str, set[int]] = {}
        groups = [number for number, optimizer in enumerate(self.optimizers) for _ in optimizer.param_groups]
        for unit in self.inventory.units:
            mine = {groups[g] for slot in unit.slots if (g := owners.get(id(slot.tensor))) is not None}
            by_optimizer.setdefault(unit.adapter, set()).update(mine)
        taken = set().union(*(by_optimizer.get(name, set()) for name in active))
        return [name for name, mine in by_optimizer.items() if name not in active and mine and not mine & taken]

    def expect(self, names: tuple[str, ...]) -> None:
        """Settle which units are expected to train.

        Args:
            names: Their adapters.
        """
        self.expected = names
        self.units: list[Unit] = self._choose([u for u in self.inventory.units if u.adapter in names])
        self.slots: list[Slot] = [slot for unit in self.units for slot in unit.slots]
        self._places = Places(slot.place for slot in self.slots)
        self.start_tensors = self.tensors()

    def _choose(self, units: list[Unit]) -> list[Unit]:
        """With several models that hold adapters, the expected ones are those that an optimizer owns."""
        groups = {unit.layer.group for unit in units}
        if len(groups) < 2:
            return units
        owners = owner_of(self.optimizers)
        owned = {unit.layer.group for unit in units for slot in unit.slots if id(slot.tensor) in owners}
        if not owned:
            names = sorted(self.inventory.groups[group] for group in groups)
            raise ValueError(
                f"found {len(groups)} models with adapters ({', '.join(names)}), and the optimizers own tensors of "
                "none: build the optimizer from the one that should train, or pass adapter= with a name that only "
                "this one has"
            )
        return [unit for unit in units if unit.layer.group in owned]

    def owned(self, names: tuple[str, ...]) -> bool:
        """An optimizer owns some tensor of one of these adapters."""
        owners = owner_of(self.optimizers)
        return any(id(s.tensor) in owners for u in self.inventory.units if u.adapter in names for s in u.slots)

    def is_frozen(self, slot: Slot) -> bool:
        """A slot is not meant to train: by PEFT, by the method, or by ``frozen=``."""
        return slot.frozen or any(part in slot.name for part in self.config.frozen)

    def others(self) -> dict[str, list[Slot]]:
        """The slots of every adapter that is not expected to train."""
        expected = {id(unit) for unit in self.units}
        found: dict[str, list[Slot]] = {}
        for unit in self.inventory.units:
            if id(unit) not in expected:
                found.setdefault(unit.adapter, []).extend(unit.slots)
        return found

    # --- what is there ----------------------------------------------------------------------

    def _find_shards(self) -> None:
        self._shards: dict[int, torch.Tensor] = {}
        self._sharded = sharded_modules(root for _, root in self.roots)
        for unit in self.inventory.units:
            for slot in unit.slots:
                slot.shards = self._shards
        self.look_behind()

    def look_behind(self) -> None:
        """FSDP2 exchanges its parameters: find the shards that stand behind what is registered now."""
        if self._sharded:
            self._shards.clear()
            self._shards.update(shards_behind(self._sharded))

    def refresh(self) -> bool:
        """Take the inventory again if a layer was exchanged; returns whether it was."""
        if self._in_place.hold:
            self.look_behind()
            return False
        self._take(take_inventory(self.roots))
        return True

    def exchanged(self) -> bool:
        """Look through the whole model for other layers than are known; returns whether there are."""
        found = take_inventory(self.roots)
        if [id(layer.module) for layer in found.layers] == [id(layer.module) for layer in self.inventory.layers]:
            return False
        self._take(found)
        return True

    def _take(self, inventory: Inventory) -> None:
        former = {slot.name: t for slot, t in zip(self.slots, self.start_tensors, strict=True) if t is not None}
        self._know(inventory)
        self._find_shards()
        self.expect(self.expected)
        self.left.update(former)
        for slot in self.slots:
            self.left.pop(slot.name, None)

    def tensors(self) -> list[torch.Tensor | None]:
        """The tensor that belongs in each expected slot: see :attr:`Slot.tensor`."""
        shown = self._places.tensors()
        return [self._shards.get(id(t), t) for t in shown] if self._shards else shown

    @property
    def device(self) -> torch.device:
        """Where the first adapter tensor is."""
        return next((t.device for s in self.slots if (t := s.tensor) is not None), torch.device("cpu"))

    @property
    def layers(self) -> list[AdaptedLayer]:
        """The layers of the expected units."""
        return [unit.layer for unit in self.units]

    def slot_of(self) -> dict[int, int]:
        """Tensor id to slot, as they are now."""
        return {id(t): i for i, t in enumerate(self.tensors()) if t is not None}


def _ways(inventory: Inventory) -> Collection[tuple[nn.Module, str, nn.Module]]:
    """Every step on the way from a root to an adapted layer: a whole block may be exchanged."""
    found: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
    for layer in inventory.layers:
        for parent, child in pairwise((*layer.chain, layer.module)):
            key = next((name for name, module in parent._modules.items() if module is child), None)
            if key is not None:
                found[id(parent), key] = parent, key, child
    return found.values()


def _lora_of_others(roots: Sequence[tuple[str, nn.Module]]) -> str | None:
    """The class of a layer that holds a pair A, B and is not PEFT's."""
    for module in (module for _, root in roots for module in root.modules()):
        if {"lora_a", "lora_b"} <= {name.lower() for name in (*module._modules, *module._parameters)}:
            return f"{type(module).__module__}.{type(module).__qualname__}"
    return None
