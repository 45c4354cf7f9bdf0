"""The layers of the expected adapters: what ran, what was passed by, and in what state they are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal

import numpy as np
import torch
from peft.utils.other import ModulesToSaveWrapper

from lora_probe_callbacks.facts import Coverage, ForwardFact, Gradients, StartFact, UnitFact
from lora_probe_callbacks.observe.device.token_rows import TokenRows
from lora_probe_callbacks.observe.model.coverage import adapter_configs, read_coverage, token_rows
from lora_probe_callbacks.observe.model.initial_state import natural_scaling, read_start
from lora_probe_callbacks.observe.model.inventory import Unit
from lora_probe_callbacks.observe.model.places import Places
from lora_probe_callbacks.observe.model.targets import Targets
from lora_probe_callbacks.observe.model.unused import idle_part

__all__ = ["Layers", "Part"]

_scaling = attrgetter("scaling")
Part = Literal["layer", "branch", "sibling"] | None  # see UnitFact.idle_part


class Layers:
    """The layers of the expected units.

    Args:
        targets: What is expected to train.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._base_used: dict[int, bool] = {}  # of units that were left out: was their base weight used?
        self._suspects: set[int] = set()  # units to be watched for that
        self._four_bit = [m for _, root in targets.roots for m in root.modules() if type(m).__name__ == "Linear4bit"]
        self.settle()

    def settle(self) -> None:
        """Begin anew with the units that are expected now."""
        units = self._targets.units
        self._called = [id(unit.layer.called) for unit in units]
        self._naturals = [natural_scaling(unit) for unit in units]
        self._of_factor = [index for index, factor in enumerate(self._naturals) if factor is not None]
        self._modules = [units[index].layer.module for index in self._of_factor]
        self._adapters = [units[index].adapter for index in self._of_factor]
        self._adapted = [unit.layer for unit in units if unit.layer.lora]
        self._weights = Places(layer.base_place for layer in self._adapted)
        bounds = np.cumsum([0, *(len(unit.slots) for unit in units)]).tolist()
        self._slots_of_unit = [tuple(range(a, b)) for a, b in itertools.pairwise(bounds)]
        self._facts: tuple[UnitFact, ...] = ()
        self._seen: object = None
        self._factors: list[float | None] = []
        self.factors_row, self.factors_moved = 0, False  # looks at which they were the same; others before

    # --- what ran ---------------------------------------------------------------------------

    def left_out(self, forwards: Sequence[ForwardFact], called: set[int]) -> list[Part] | None:
        """Of every expected unit, the part around it that was left out.

        Args:
            forwards: The forwards of this step.
            called: Ids of the modules that ran in training forwards.

        Returns:
            One entry a unit, or None where calls were not seen.
        """
        if not any(f.received and f.calls is not None for f in forwards):
            return None
        inventory = self._targets.inventory
        if called.issuperset(self._called):  # as a rule
            return [None] * len(self._called)
        return [
            None if layer in called else idle_part(unit, called, inventory)
            for unit, layer in zip(self._targets.units, self._called, strict=True)
        ]

    def factors(self) -> list[float | None]:
        """The factor of the product BA in every expected unit; None where its method has none."""
        found: list[float | None] = [None] * len(self._called)
        now = map(dict.get, map(_scaling, self._modules), self._adapters)
        for unit, factor in zip(self._of_factor, now, strict=True):
            if isinstance(factor, (float, int)):  # else it is no plain number any more
                found[unit] = float(factor)
        same = found == self._factors
        self.factors_moved |= bool(self._factors) and not same
        self._factors, self.factors_row = found, self.factors_row + 1 if same else 1
        return found

    def facts(
        self,
        parts: Sequence[Part] | None,
        factors: Sequence[float | None],
        gradients: Gradients,
        used: Mapping[int, bool],
    ) -> tuple[UnitFact, ...]:
        """Every expected unit: was it left out, and was its base weight used without it?

        Args:
            parts: See :meth:`left_out`.
            factors: See :meth:`factors`.
            gradients: As they were read.
            used: Whether the base weight of a unit was in use, for units that were watched for that.

        Returns:
            One fact a unit; the same tuple again while nothing of it changes.
        """
        self._base_used.update(used)
        if parts is not None and (any(parts) or self._suspects or self._base_used):
            for index, part in enumerate(parts):
                slots = list(self._slots_of_unit[index]) if part in ("layer", "sibling") else []
                if slots and not gradients.signal[slots].any() and not gradients.broken[slots].any():
                    self._suspects.add(index)
                else:
                    self._suspects.discard(index)
                    self._base_used.pop(index, None)
        seen = (parts or [None] * len(factors), factors, dict(self._base_used))
        if seen != self._seen:
            states = zip(*seen[:2], map(self._base_used.get, range(len(factors))), strict=True)
            self._seen, self._facts = seen, tuple(self._fact(i, *now) for i, now in enumerate(states))
        return self._facts

    def _fact(self, index: int, part: Part, factor: float | None, used: bool | None) -> UnitFact:
        unit = self._targets.units[index]
        return UnitFact(
            name=unit.layer.name,
            adapter=unit.adapter,
            slots=self._slots_of_unit[index],
            idle_part=part,
            base_weight_used=used,
            lora=unit.layer.lora,
            scaling=factor,
            natural=self._naturals[index],
        )

    def suspected_weights(self) -> dict[int, int]:
        """Id of the base weight to unit, for layers that were left out while their surroundings ran."""
        units = self._targets.units
        found = {id(w): u for u in self._suspects if (w := _used_instead(units[u])) is not None}
        copied = [u for u in found.values() if not units[u].layer.lora]
        shared = self._tied() if copied else set()
        return {weight: unit for weight, unit in found.items() if unit not in copied or weight not in shared}

    def _tied(self) -> set[int]:
        """Parameters that stand in several places: who uses one may mean another of them."""
        places: dict[int, int] = {}
        modules = {m for _, root in self._targets.roots for m in root.modules()}
        for parameter in (p for m in modules for p in m._parameters.values()):
            places[id(parameter)] = places.get(id(parameter), 0) + 1
        return {parameter for parameter, count in places.items() if count > 1}

    # --- the state in which they are --------------------------------------------------------

    def start(self, framework_step: int) -> StartFact:
        """What the expected units hold before the first training forward."""
        targets = self._targets
        held = {id(t): state for optimizer in targets.optimizers for t, state in optimizer.state.items()}
        first: Mapping[str, Any] = next((held[i] for slot in targets.slots if (i := id(slot.tensor)) in held), {})
        return read_start(
            targets.units,
            adapter_configs(targets.roots),
            framework_step=framework_step,
            # Adagrad makes its state before the first step, with a count of 0; LBFGS before its first closure.
            optimizer_state=float(first.get("step", 0)) > 0 or first.get("momentum_buffer") is not None,
        )

    def coverage(self) -> Coverage:
        """What was asked for, and what the expected units cover."""
        config, targets = self._targets.config, self._targets
        return read_coverage(
            targets.roots, targets.units, expect_targets=config.expect_targets, new_token_ids=config.new_token_ids
        )

    def token_rows(self) -> list[TokenRows]:
        """The embeddings in which the rows of declared tokens can be watched."""
        tokens = self._targets.config.new_token_ids
        return token_rows(self._targets.roots, self._targets.units, tokens) if tokens else []

    def trainable_bases(self) -> tuple[str, ...]:
        """Names of the expected layers whose base weight requires gradients."""
        weights = zip(self._adapted, self._weights.tensors(), strict=True)
        there = ((layer, layer.base_weight if known is None else known) for layer, known in weights)
        trainable = {layer.name: id(weight) for layer, weight in there if weight is not None and weight.requires_grad}
        if not trainable:
            return ()
        shared = self._shared_weights()
        return tuple(name for name, weight in trainable.items() if weight not in shared)

    def _shared_weights(self) -> set[int]:
        """Base weights that also stand somewhere without an adapter: a tied embedding that is meant to train."""
        inventory, roots = self._targets.inventory, self._targets.roots
        under = {id(w) for u in inventory.units if (w := u.layer.base_weight) is not None}
        bases = {id(u.layer.module.get_base_layer()) for u in inventory.units if u.layer.lora}  # type: ignore[operator]
        return {
            id(p)
            for _, root in roots
            for m in root.modules()
            if id(m) not in bases
            for p in m._parameters.values()
            if p is not None and id(p) in under
        }

    def packed(self) -> tuple[int, int]:
        """4-bit weights that bitsandbytes holds in its layout for inference, and all 4-bit weights.

        On CPUs with AVX512-BF16 a forward in eval mode without input gradients packs them, and every later
        forward goes through a kernel without a backward (bitsandbytes 0.50, nn/modules.py, Linear4bit.forward).

        Returns:
            Both counts.
        """
        states = [getattr(m.weight, "quant_state", None) for m in self._four_bit]
        return sum(bool(getattr(state, "packing_format_for_cpu", False)) for state in states), len(states)


def _used_instead(unit: Unit) -> torch.Tensor | None:
    """The weight that is in use where a unit's layer is passed by: its base's, or the original of a copy."""
    if isinstance(unit.layer.module, ModulesToSaveWrapper):
        weight = unit.layer.module.original_module._parameters.get("weight")
        return weight if isinstance(weight, torch.Tensor) else None
    return unit.layer.base_weight
