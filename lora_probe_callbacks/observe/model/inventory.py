"""Which adapter tensors a model holds, where, and in which state its layers are.

Read once when training starts, then by plain attribute look-ups: reading the flags of all
layers costs a fraction of a millisecond, PEFT's ``get_layer_status`` some twenty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.xlora.model import XLoraModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from lora_probe_callbacks.facts import Mode, Role
from lora_probe_callbacks.observe.model._versions import frozen_weight_names
from lora_probe_callbacks.observe.model.places import Place
from lora_probe_callbacks.observe.model.wrappers import is_compiled

__all__ = ["AdaptedLayer", "Inventory", "Slot", "Unit", "mode", "take_inventory"]


@dataclass(eq=False, slots=True)
class AdaptedLayer:
    """A module that carries adapters: a tuner layer, a ``modules_to_save`` wrapper, a prompt encoder."""

    module: nn.Module
    name: str
    parent: nn.Module | None
    key: str  # name under the parent: is this module still what the parent calls?
    called: nn.Module  # the module whose call shows that the adapter took part
    compiled: bool
    lora: bool
    chain: tuple[nn.Module, ...] = ()  # the modules above it, from the root down
    group: int = 0  # the model that it belongs to: several PeftModels may stand side by side
    # Asked of every layer in every probed forward, and isinstance of torch's modules is slow.
    tuner: bool = field(init=False)
    switched: bool = field(init=False)  # has switches of its own
    plain: bool = field(init=False)  # its switches are the attributes behind PEFT's properties, and nothing else

    def __post_init__(self) -> None:
        self.tuner = isinstance(self.module, BaseTunerLayer)
        self.switched = self.tuner or isinstance(self.module, ModulesToSaveWrapper)
        known = BaseTunerLayer if self.tuner else ModulesToSaveWrapper
        names = ("disable_adapters", "active_adapter", "active_adapters")
        self.plain = (
            self.switched
            and all(getattr(type(self.module), name) is getattr(known, name) for name in names)
            and hasattr(self.module, "_disable_adapters")
            and hasattr(self.module, "_active_adapter")
        )

    @property
    def disabled(self) -> bool:
        """The adapters of this layer are switched off."""
        if self.plain:
            return self.module._disable_adapters  # type: ignore[return-value]
        if self.switched:
            return bool(self.module.disable_adapters)
        return bool(getattr(self.module, "_adapters_disabled", False))

    @property
    def merged(self) -> Sequence[str]:
        """Names of the adapters that are merged into the base weight."""
        return self.module.merged_adapters if self.tuner else ()  # type: ignore[return-value]

    @property
    def active(self) -> Sequence[str]:
        """Names of the active adapters."""
        if self.plain:
            active = self.module._active_adapter
        elif self.switched:
            active = self.module.active_adapters
        else:
            active = getattr(self.module, "active_adapter", ())  # type: ignore[arg-type]
        return (active,) if isinstance(active, str) else active  # type: ignore[return-value]

    @property
    def base_weight(self) -> torch.Tensor | None:
        """The weight that a LoRA layer adapts, or None where there is not one tensor of that name."""
        if not self.lora:
            return None
        base = self._base[-1]
        weight = base._parameters.get("weight")
        if weight is None:  # not a parameter of its own: parametrized, or made by its module
            weight = getattr(base, "weight", None)
        return weight if isinstance(weight, torch.Tensor) else None

    @property
    def base_place(self) -> Place:
        """Where that weight is registered, if it is a parameter of its own."""
        return Place(self.module, ("base_layer",) * (len(self._base) - 1), "weight")

    @property
    def _base(self) -> list[nn.Module]:
        """The module itself and those within it, down to the one that PEFT's ``get_base_layer()`` gives."""
        found = [self.module]
        while (inner := found[-1]._modules.get("base_layer")) is not None:
            found.append(inner)
        return found

    def mode(self, adapter: str) -> Mode:
        """What the layer's forward would do with ``adapter`` now, in the order that PEFT asks."""
        return mode(self.disabled, self.merged, self.active, adapter)


def mode(disabled: bool, merged: Sequence[str], active: Sequence[str], adapter: str) -> Mode:
    """What the forward of a layer with these switches would do with ``adapter``, in the order that PEFT asks."""
    if disabled:
        return "disabled"
    if adapter in merged:
        return "merged"
    return "active" if adapter in active else "inactive"


@dataclass(eq=False, slots=True)
class Slot:
    """The place of one adapter tensor: a layer, and the path from it to a registered parameter."""

    layer: AdaptedLayer
    path: tuple[str, ...]
    adapter: str
    role: Role
    frozen: bool  # PEFT or the method keeps it frozen by design
    shards: dict[int, torch.Tensor] = field(default_factory=dict)  # see wrappers.shards_behind; one for all slots
    name: str = field(init=False)  # qualified, for people

    def __post_init__(self) -> None:
        self.name = ".".join((self.layer.name, *self.path))

    @property
    def place(self) -> Place:
        """Where it is registered."""
        return Place(self.layer.module, self.path[:-1], self.path[-1])

    @property
    def tensor(self) -> torch.Tensor | None:
        """The tensor that belongs there: what is registered now, or the shard that it stands for."""
        shown = self.shown
        return self.shards.get(id(shown), shown) if self.shards else shown

    @property
    def shown(self) -> torch.Tensor | None:
        """The tensor that is registered there now."""
        return self.place.tensor


@dataclass(eq=False, slots=True)
class Unit:
    """One adapter in one layer, with its slots."""

    layer: AdaptedLayer
    adapter: str
    slots: list[Slot] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Inventory:
    """Everything about adapters that one look at the modules gives."""

    layers: list[AdaptedLayer]
    units: list[Unit]
    ancestors: list[tuple[str, nn.Module, bool]]  # (name, module, inside a compiled region)
    rewrapped: list[str]
    nested: list[str]
    unloaded: list[str]
    out_of_reach: list[str]  # tuners whose trained tensors lie in no tuner layer
    compiled: list[str]  # compiled regions whose layers cannot be hooked
    groups: dict[int, str]  # the models that hold adapters, by name

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters, in the order of their first appearance."""
        return list(dict.fromkeys(unit.adapter for unit in self.units))

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the adapters that are active in at least one layer."""
        return tuple(dict.fromkeys(name for layer in self.layers for name in layer.active))


def take_inventory(roots: Iterable[tuple[str, nn.Module]]) -> Inventory:
    """Find all adapted layers below ``roots``.

    Args:
        roots: (name, module) pairs; they may overlap, each layer is taken once.

    Returns:
        The layers, units and slots, and the modules above them.
    """
    inventory = Inventory([], [], [], [], [], [], [], [], {})
    seen: set[int] = set()
    above: dict[int, tuple[str, nn.Module, bool]] = {}
    for root_name, root in roots:
        modules = dict(root.named_modules(prefix=root_name))
        for name, module in modules.items():
            layer = _adapted_layer(name, module, modules)
            if layer is None or id(module) in seen:
                continue
            seen.add(id(module))
            chain = list(_chain(name, modules))
            layer.compiled = any(is_compiled(m) for _, m in chain) or is_compiled(module)
            layer.chain = tuple(m for _, m in chain)
            top = next(((n, m) for n, m in chain if isinstance(m, PeftModel | PeftMixedModel)), (root_name, root))
            layer.group = id(top[1])
            inventory.groups.setdefault(id(top[1]), top[0] or type(top[1]).__name__)
            inventory.layers.append(layer)
            inventory.units.extend(_units(layer))
            if _inside_adapter_part(module, chain):
                inventory.nested.append(name)
            inside = False
            if not isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
                # A prompt-learning model is bypassed by calling the base model inside it.
                base = module.get_base_model()
                base_name = next((n for n, m in modules.items() if m is base), name)
                above.setdefault(id(module), (name, module, any(is_compiled(m) for _, m in chain)))
                above.setdefault(id(base), (base_name, base, is_compiled(module)))
            for ancestor_name, ancestor in chain:
                above.setdefault(id(ancestor), (ancestor_name, ancestor, inside))
                inside = inside or is_compiled(ancestor)
        inventory.rewrapped.extend(_rewrapped(modules))
        inventory.unloaded.extend(_unloaded(modules))
        inventory.out_of_reach.extend(_out_of_reach(modules))
        inventory.compiled.extend(name for name, module in modules.items() if is_compiled(module))
    inventory.ancestors = list(above.values())
    return inventory


def _adapted_layer(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> AdaptedLayer | None:
    parent_name, _, key = name.rpartition(".")
    parent = modules.get(parent_name) if name else None
    if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
        return AdaptedLayer(module, name, parent, key, module, False, isinstance(module, LoraLayer))
    encoders = module._modules.get("prompt_encoder") if isinstance(module, PeftModel) else None
    if encoders is not None and len(list(encoders.children())):
        # Prompt learning: the tensors live in the PeftModel itself, so that object, not the base
        # model inside it, must be the one called (peft#940).
        return AdaptedLayer(module, name, None, key, encoders, False, lora=False)
    return None


def _units(layer: AdaptedLayer) -> Iterator[Unit]:
    module = layer.module
    if isinstance(module, BaseTunerLayer):
        parts = tuple(dict.fromkeys(module.adapter_layer_names))  # DoRA's magnitude stands there twice (peft 0.21)
        frozen_names = frozen_weight_names(module)
    else:
        parts = ("modules_to_save",) if isinstance(module, ModulesToSaveWrapper) else ("prompt_encoder",)
        frozen_names = {}
    units: dict[str, Unit] = {}
    for part in parts:
        container = module._modules.get(part)
        if container is None:
            continue
        for path in _parameter_paths(container):
            adapter = path[0]
            frozen = part in frozen_names.get(adapter, ())
            slot = Slot(layer, (part, *path), adapter, _role(part), frozen)
            units.setdefault(adapter, Unit(layer, adapter)).slots.append(slot)
    yield from units.values()


def _parameter_paths(container: nn.Module) -> Iterator[tuple[str, ...]]:
    """Paths to the parameters below a per-adapter container; the first part is the adapter's name."""
    for name in container._parameters:
        if container._parameters[name] is not None:
            yield (name,)
    for key, child in container._modules.items():
        for name, _ in () if child is None else child.named_parameters(remove_duplicate=False):
            yield (key, *name.split("."))


def _role(part: str) -> Role:
    if part in ("lora_A", "lora_embedding_A"):
        return "A"
    return "B" if part in ("lora_B", "lora_embedding_B") else "other"


def _chain(name: str, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The modules above ``name``, from the root down."""
    parts = name.split(".")
    for i in range(len(parts)):
        ancestor = ".".join(parts[:i])
        if ancestor in modules:
            yield ancestor, modules[ancestor]


def _inside_adapter_part(module: nn.Module, chain: list[tuple[str, nn.Module]]) -> bool:
    """A tuner layer within lora_A and the like, or around a second one with the same adapter."""
    if not isinstance(module, BaseTunerLayer):
        return False
    for name, ancestor in chain:
        if isinstance(ancestor, BaseTunerLayer):
            below = {child for child, m in ancestor.named_modules() if m is module}
            parts = {child.split(".")[0] for child in below}
            if parts & set(ancestor.adapter_layer_names):
                return True
            # base_layer is another layer of the same kind with the same adapter: injected twice.
            # A chain of ParamWrappers and MultiheadAttention's out_proj nest by design.
            if ancestor.base_layer is module and type(ancestor) is type(module) and name:
                plain = type(module).__name__ != "ParamWrapper"
                if plain and set(_adapters_of(ancestor)) & set(_adapters_of(module)):
                    return True
    return False


def _adapters_of(module: nn.Module) -> Iterator[str]:
    for part in module.adapter_layer_names if isinstance(module, BaseTunerLayer) else ():
        container = module._modules.get(part)
        if container is not None:
            yield from (path[0] for path in _parameter_paths(container))


def _rewrapped(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    peft = {name: m for name, m in modules.items() if isinstance(m, PeftModel | PeftMixedModel)}
    for name in peft:
        if any(other != name and name.startswith(f"{other}." if other else "") for other in peft):
            yield name


def _without_tuner_layers(module: nn.Module) -> bool:
    return isinstance(module, PeftModel | PeftMixedModel) and not any(
        isinstance(m, BaseTunerLayer | ModulesToSaveWrapper) or "prompt_encoder" in m._modules for m in module.modules()
    )


def _unloaded(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    for name, module in modules.items():
        if _without_tuner_layers(module) and isinstance(module.base_model, BaseTuner):
            yield name


def _out_of_reach(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Adaption prompt exchanges attention modules; X-LoRA trains a classifier over frozen adapters (peft 0.21)."""
    for module in modules.values():
        if isinstance(module, XLoraModel) and not module.xlora_config.use_trainable_adapters:
            yield type(module).__name__
        elif _without_tuner_layers(module) and not isinstance(module.base_model, BaseTuner):
            yield type(module.base_model).__name__
