"""What is expected to train, and what holds it: the observer that knows the whole model.

Built from the inventory and the names that are meant; asked at every decision for its present state.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.optim import Optimizer

from lora_probe_callbacks.facts import (
    Coverage,
    ForwardFact,
    GradientFact,
    OtherAdapter,
    SlotFact,
    StartFact,
    UnitFact,
    Wrapping,
)
from lora_probe_callbacks.observe.device.batching import Held, held
from lora_probe_callbacks.observe.device.token_rows import TokenRows
from lora_probe_callbacks.observe.device.transfer import Readout, local
from lora_probe_callbacks.observe.device.updates import Fingerprints, Followers
from lora_probe_callbacks.observe.model.coverage import adapter_configs, read_coverage, token_rows
from lora_probe_callbacks.observe.model.initial_state import natural_scaling, read_start, scaling
from lora_probe_callbacks.observe.model.inventory import AdaptedLayer, Inventory, Slot, Unit, take_inventory
from lora_probe_callbacks.observe.model.master_weights import Copies, find_copies
from lora_probe_callbacks.observe.model.ownership import Ownership, ownership, tensors_of
from lora_probe_callbacks.observe.model.unused import idle_part
from lora_probe_callbacks.observe.model.wrappers import (
    DataParallel,
    is_flat,
    is_shard,
    master_copies,
    replicas,
    sharded_modules,
    shards_behind,
    tensor_parallel,
)

__all__ = ["NotJudgedError", "Part", "Scene"]

Part = Literal["layer", "branch", "sibling"] | None  # see UnitFact.idle_part


class NotJudgedError(ValueError):
    """What trains lies in no slot: tensors poured into flat parameters, or a tuner without tuner layers."""


class Scene:
    """The expected units and slots of a model, and everything around them.

    Args:
        roots: (name, module) pairs that hold what is trained.
        optimizers: Torch optimizers.
        adapter: Declared name(s) that must train, or None.
        reference: Declared names that must stay frozen.
        lagged: Declared names that follow.
        frozen: Name parts of tensors that are meant to stay frozen.

    Raises:
        ValueError: If there is no adapter, a name that does not exist, or no way to choose.
    """

    def __init__(
        self,
        roots: Sequence[tuple[str, nn.Module]],
        optimizers: Sequence[Optimizer],
        *,
        adapter: tuple[str, ...] | None,
        reference: Sequence[str],
        lagged: Sequence[str],
        frozen: Sequence[str],
    ) -> None:
        self.roots = roots
        self.optimizers = optimizers
        self.declared = adapter
        self._reference = tuple(reference)
        self._lagged = tuple(lagged)
        self._frozen = tuple(frozen)
        self.inventory: Inventory = take_inventory(roots)
        self._check_names()
        self.ever_changed: set[str] = set()
        self.base_used: dict[int, bool] = {}  # of units that were left out: was their base weight used?
        self.suspects: set[int] = set()  # units to be watched for that
        self._left: dict[str, torch.Tensor] = {}  # what layers held that are no longer there
        self._four_bit = [m for _, root in roots for m in root.modules() if type(m).__name__ == "Linear4bit"]
        self._shards: dict[int, torch.Tensor] = {}
        self._find_shards()
        self.inside_forward = False  # a module has been called: its tensors may be stand-ins
        self._outside: list[torch.Tensor | None] = []  # the tensors of the last look
        self._looked: tuple[object, ...] | None = None  # what it saw
        self.copies: Copies | None = None
        self._looked_for_copies = False
        self.expect(self.active_names())

    def _find_shards(self) -> None:
        self._sharded = sharded_modules(root for _, root in self.roots)
        for unit in self.inventory.units:
            for slot in unit.slots:
                slot.shards = self._shards
        self._look_behind()

    def _look_behind(self) -> None:
        if self._sharded:
            self._shards.clear()
            self._shards.update(shards_behind(self._sharded))

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
            names = ", ".join(f"{name or 'the model'} ({type(module).__name__})" for name, module in self.roots)
            raise ValueError(
                f"found no PEFT adapter in {names}; expected a PeftModel or a model with add_adapter(): attach the "
                "adapter before training starts (a model that was merged and unloaded has none left)"
            )
        asked: dict[str, tuple[str, ...]] = {
            "adapter": self.declared or (),
            "reference_adapters": self._reference,
            "lagged_adapters": self._lagged,
        }
        for argument, wanted in asked.items():
            unknown = [name for name in wanted if name not in inventory.adapters]
            if unknown and not inventory.unloaded:
                raise ValueError(f"{argument} got {unknown}, expected names among {inventory.adapters}")

    def active_names(self) -> tuple[str, ...]:
        """The adapters that must train: as declared, else those active now that are no reference."""
        if self.declared is not None:
            return self.declared
        aside = {*self._reference, *self._lagged}
        active = tuple(name for name in self.inventory.active if name not in aside)
        return active or tuple(name for name in self.inventory.adapters if name not in aside)

    def owned(self, names: tuple[str, ...]) -> bool:
        """An optimizer owns some tensor of one of these adapters."""
        owners = ownership(self.optimizers)
        return any(id(s.tensor) in owners for u in self.inventory.units if u.adapter in names for s in u.slots)

    def expect(self, names: tuple[str, ...]) -> None:
        """Settle which units are expected to train.

        Args:
            names: Their adapters.
        """
        self.expected, self._outside, self._looked = names, [], None
        self.units: list[Unit] = self._choose([u for u in self.inventory.units if u.adapter in names])
        self.slots: list[Slot] = [slot for unit in self.units for slot in unit.slots]
        self._unit_of_slot = [number for number, unit in enumerate(self.units) for _ in unit.slots]
        self._start_tensors = [slot.tensor for slot in self.slots]
        self._kept = [s.frozen or any(part in s.name for part in self._frozen) for s in self.slots]
        self._slot_facts: tuple[SlotFact, ...] = ()
        self._slots_seen: Sequence[object] | None = None  # what they were made of
        self.look()
        expected = {id(unit) for unit in self.units}
        self._others: dict[str, list[Slot]] = {}
        for unit in self.inventory.units:
            if id(unit) not in expected:
                self._others.setdefault(unit.adapter, []).extend(unit.slots)
        self._fingerprints = {
            name: Fingerprints({s.name: t for s in slots if (t := s.tensor) is not None})
            for name, slots in self._others.items()
            if name not in self._lagged
        }
        lagged = {name: [t for s in self._others.get(name, ()) if (t := s.tensor) is not None] for name in self._lagged}
        self.followers = Followers(lagged)
        self._naturals = [natural_scaling(unit) for unit in self.units]
        starts = itertools.accumulate((len(unit.slots) for unit in self.units), initial=0)
        self._slots_of_unit = [tuple(range(i, i + len(u.slots))) for i, u in zip(starts, self.units, strict=False)]
        self._unit_facts: tuple[UnitFact, ...] = ()
        self._units_seen: Sequence[object] | None = None

    def _choose(self, units: list[Unit]) -> list[Unit]:
        """With several models that hold adapters, the expected ones are those that an optimizer owns."""
        groups = {unit.layer.group for unit in units}
        if len(groups) < 2:
            return units
        owners = ownership(self.optimizers)
        owned = {unit.layer.group for unit in units for slot in unit.slots if id(slot.tensor) in owners}
        if not owned:
            names = sorted(self.inventory.groups[group] for group in groups)
            raise ValueError(
                f"found {len(groups)} models with adapters ({', '.join(names)}), and the optimizers own tensors of "
                "none: build the optimizer from the one that should train, or pass adapter= with a name that only "
                "this one has"
            )
        return [unit for unit in units if unit.layer.group in owned]

    def look(self) -> None:
        """See which tensors the slots hold now, and who owns them; what is asked until the next look is of these."""
        self._owners = ownership(self.optimizers)
        tensors = [slot.tensor for slot in self.slots]
        if self.inside_forward and len(tensors) == len(self._outside):
            tensors = [self._behind_stand_in(now, before) for now, before in zip(tensors, self._outside, strict=True)]
        self._tensors = self._outside = tensors
        self._owned = [self._owners.get(id(tensor)) for tensor in self._tensors]
        self._sizes = self._group_sizes()
        self._behind: dict[int, Ownership] = {}  # slot to the owner of its copy
        if self.copies is not None:
            holders = self.copies.holders
            self._behind = {i: own for i, t in holders.items() if (own := self._owners.get(id(t))) is not None}
        self._kinds_known: set[tuple[int, bool]] = set()  # see held()
        owners = [None if own is None else own.optimizer for own in self._owned]  # rates may change at every step
        seen = list(map(id, tensors)), owners, {i: own.optimizer for i, own in self._behind.items()}
        if seen == self._looked:  # the tensors of the last look were held up to now: an id stands for one of them
            return
        self._looked = seen
        self._of: dict[tuple[int, bool], dict[int, torch.Tensor]] = {}  # see tensors()
        self._held: dict[tuple[int, bool], Held] = {}
        self._some_unowned = None in self._owned
        self._owning = {own.optimizer for own in (*self._owned, *self._behind.values()) if own is not None} or set(
            range(len(self.optimizers))
        )

    def _behind_stand_in(self, now: torch.Tensor | None, before: torch.Tensor | None) -> torch.Tensor | None:
        """torch.func.functional_call puts others in the place of what an optimizer owns, for one forward."""
        return before if id(now) not in self._owners and id(before) in self._owners else now

    def _group_sizes(self) -> list[int]:
        return [len(group["params"]) for optimizer in self.optimizers for group in optimizer.param_groups]

    def refresh(self) -> bool:
        """Look, and take the inventory again if a layer was exchanged; returns whether it was."""
        if self.inventory.in_place:
            self._look_behind()
            self.look()
            return False
        self.copies = None  # the slots are others
        former = {slot.name: t for slot, t in zip(self.slots, self._start_tensors, strict=True) if t is not None}
        self.inventory = take_inventory(self.roots)
        self._find_shards()
        self.expect(self.expected)
        self._left.update(former)
        for slot in self.slots:
            self._left.pop(slot.name, None)
        return True

    def vanished(self) -> tuple[str, ...]:
        """Names of tensors that an optimizer steps although their layer has left the model."""
        if not self._left:
            return ()
        owners = self._owners
        held = {id(p) for _, root in self.roots for p in root.parameters()}
        return tuple(name for name, t in self._left.items() if id(t) in owners and id(t) not in held)

    # --- what is there ----------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the first adapter tensor is."""
        return next((t.device for s in self.slots if (t := s.tensor) is not None), torch.device("cpu"))

    @property
    def layers(self) -> list[AdaptedLayer]:
        """The layers of the expected units."""
        return [unit.layer for unit in self.units]

    def owners(self) -> set[int]:
        """The optimizers that own expected tensors; all of them if none does.

        Asked in every step: between looks, only the sizes of the groups tell that something has changed.

        Returns:
            Their numbers.
        """
        if self._group_sizes() != self._sizes:
            self.look()
        return self._owning

    def has_gradients(self, optimizer: int) -> bool:
        """Some tensor of an optimizer has a gradient."""
        return any(t.grad is not None for t in tensors_of([self.optimizers[optimizer]]))

    def tensors(self, optimizer: int, *, unowned: bool = False) -> Mapping[int, torch.Tensor]:
        """Slots whose tensors an optimizer owns, and on request those that nobody owns."""
        unowned = unowned and self._some_unowned
        found = self._of.get((optimizer, unowned))
        if found is None:
            found = self._of[optimizer, unowned] = {
                index: tensor
                for index, (tensor, own) in enumerate(zip(self._tensors, self._owned, strict=True))
                if tensor is not None and (own.optimizer == optimizer if own is not None else unowned)
            }
        return found

    def held(self, optimizer: int, *, unowned: bool = False) -> Held:
        """The same, grouped for reading. For use under ``no_grad``."""
        which = (optimizer, unowned and self._some_unowned)
        found = self._held.get(which)
        if found is None or (which not in self._kinds_known and not found.fits()):
            found = self._held[which] = held(self.tensors(optimizer, unowned=unowned))
        self._kinds_known.add(which)
        return found

    def forget_kinds(self) -> None:
        """A step was made, and user code runs until the next one: what is held may be of other kinds by then."""
        self._kinds_known.clear()

    def whole(self) -> dict[int, torch.Tensor]:
        """Slots that are meant to train and of which this rank holds all."""
        return {
            index: tensor
            for index, (tensor, kept) in enumerate(zip(self._tensors, self._kept, strict=True))
            if tensor is not None and not is_shard(tensor) and not kept
        }

    def shards(self) -> dict[int, float]:
        """Slots of which this rank holds a part, and by how many ranks that part is held, inverted."""
        return {
            index: 1 / replicas(tensor)
            for index, tensor in enumerate(self._tensors)
            if tensor is not None and is_shard(tensor)
        }

    def why_not_owned(self) -> str:
        """Say why no tensor of the adapter can be told apart in the optimizer, or give the empty string.

        Returns:
            The reason.
        """
        if self._behind or any(own is not None for own in self._owned):
            return ""
        return master_copies(root for _, root in self.roots)

    def wrapping(self, parallel: DataParallel | None, called: set[int], *, synced: bool) -> Wrapping:
        """What holds several processes together, and what it leaves out.

        Args:
            parallel: The wrapper, if there is one.
            called: Ids of the modules that ran in training forwards.
            synced: The last of these forwards was outside ``no_sync``.

        Returns:
            The fact.
        """
        whole = self.whole()
        if parallel is None:
            together = not tensor_parallel([root for _, root in self.roots])
            return Wrapping(None, -1, None, True, False, (), len(whole) if together else 0)
        shard = next((self._tensors[i] for i in self.shards()), None)
        mesh = getattr(shard, "device_mesh", None)
        first = int(mesh.mesh.min()) if mesh is not None else min(parallel.ranks, default=-1)
        return Wrapping(
            kind=parallel.kind,
            first=first,
            entered=id(parallel.module) in called if called else None,
            synced=synced,
            hook=parallel.hook,
            unmanaged=tuple(i for i, t in whole.items() if t.requires_grad and not parallel.manages(t)),
            whole=len(whole),
        )

    def slot_of(self) -> dict[int, int]:
        """Tensor id to slot."""
        self.look()
        return self.seen()

    def seen(self) -> dict[int, int]:
        """The same as of the last look."""
        return {id(t): i for i, t in enumerate(self._tensors) if t is not None}

    def slot_facts(self) -> tuple[SlotFact, ...]:
        """Every expected slot as it is now; the same tuple again while nothing of it changes."""
        seen = (
            [None if t is None else (t.requires_grad, t.dtype, local(t).numel()) for t in self._tensors],
            [None if own is None else (own.optimizer, own.weight_decay) for own in self._owners_of_slots()],
        )
        if seen != self._slots_seen:
            self._slots_seen, self._slot_facts = seen, tuple(map(self._slot_fact, range(len(self.slots)), seen[1]))
        return self._slot_facts

    def _owners_of_slots(self) -> list[Ownership | None]:
        return [own or self._behind.get(i) for i, own in enumerate(self._owned)]

    def rates(self) -> tuple[float | None, ...]:
        """The learning rate of every slot as of the last look: apart from the slots, since schedules change it."""
        return tuple([None if own is None else own.learning_rate for own in self._owners_of_slots()])

    def _slot_fact(self, index: int, own: tuple[int, float] | None) -> SlotFact:
        slot, tensor = self.slots[index], self._tensors[index]
        return SlotFact(
            name=slot.name,
            adapter=slot.adapter,
            role=slot.role,
            unit=self._unit_of_slot[index],
            requires_grad=tensor is not None and tensor.requires_grad,
            owner=None if own is None else own[0],
            weight_decay=None if own is None else own[1],
            frozen_by_intent=self._kept[index],
            half=tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16),
            numel=0 if tensor is None else local(tensor).numel(),
            part=slot.path[0],
        )

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
        return [
            None if id(unit.layer.called) in called else idle_part(unit, called, self.inventory) for unit in self.units
        ]

    def factors(self) -> list[float | None]:
        """The factor of the product BA in every expected unit; None where its method has none."""
        return [None if n is None else scaling(u) for u, n in zip(self.units, self._naturals, strict=True)]

    def unit_facts(
        self,
        parts: Sequence[Part] | None,
        factors: Sequence[float | None],
        gradients: Sequence[GradientFact | None],
        used: Mapping[int, bool],
    ) -> tuple[UnitFact, ...]:
        """Every expected unit: was it left out, and was its base weight used without it?

        Args:
            parts: See :meth:`left_out`.
            factors: See :meth:`factors`.
            gradients: One entry a slot.
            used: Whether the base weight of a unit was in use, for units that were watched for that.

        Returns:
            One fact a unit; the same tuple again while nothing of it changes.
        """
        self.base_used.update(used)
        for index, part in enumerate(parts or ()):
            if part is None and not self.suspects and not self.base_used:
                continue
            slots = self._slots_of_unit[index] if part in ("layer", "sibling") else ()
            if slots and all((g := gradients[s]) is None or not g.present or g.zero for s in slots):
                self.suspects.add(index)
            else:
                self.suspects.discard(index)
                self.base_used.pop(index, None)
        seen = (parts or [None] * len(factors), factors, dict(self.base_used))
        if seen != self._units_seen:
            states = zip(*seen[:2], map(self.base_used.get, range(len(factors))), strict=True)
            self._units_seen, self._unit_facts = seen, tuple(self._unit_fact(i, *now) for i, now in enumerate(states))
        return self._unit_facts

    def _unit_fact(self, index: int, part: Part, factor: float | None, used: bool | None) -> UnitFact:
        layer = self.units[index].layer
        return UnitFact(
            name=layer.name,
            adapter=self.units[index].adapter,
            slots=self._slots_of_unit[index],
            idle_part=part,
            base_weight_used=used,
            lora=layer.lora,
            scaling=factor,
            natural=self._naturals[index],
        )

    def start(self, framework_step: int) -> StartFact:
        """What the expected units hold before the first training forward."""
        held = {id(t): state for optimizer in self.optimizers for t, state in optimizer.state.items()}
        first: Mapping[str, Any] = next((held[i] for slot in self.slots if (i := id(slot.tensor)) in held), {})
        return read_start(
            self.units,
            adapter_configs(self.roots),
            framework_step=framework_step,
            # Adagrad makes its state before the first step, with a count of 0; LBFGS before its first closure.
            optimizer_state=float(first.get("step", 0)) > 0 or first.get("momentum_buffer") is not None,
        )

    def coverage(self, expect_targets: Sequence[str], new_token_ids: Sequence[int]) -> Coverage:
        """What was asked for, and what the expected units cover."""
        return read_coverage(self.roots, self.units, expect_targets=expect_targets, new_token_ids=new_token_ids)

    def rows_of(self, new_token_ids: Sequence[int]) -> list[TokenRows]:
        """The embeddings in which the rows of declared tokens can be watched."""
        return token_rows(self.roots, self.units, new_token_ids) if new_token_ids else []

    def suspected_weights(self) -> dict[int, int]:
        """Id of the base weight to unit, for layers that were left out while their surroundings ran."""
        found = {id(w): u for u in self.suspects if (w := _used_instead(self.units[u])) is not None}
        copied = [u for u in found.values() if not self.units[u].layer.lora]
        shared = self._tied() if copied else set()
        return {weight: unit for weight, unit in found.items() if unit not in copied or weight not in shared}

    def replaced(self) -> tuple[tuple[int, ...], int]:
        """Slots whose former tensor, or a twin of it, is what an optimizer holds.

        Returns:
            The slots, and how many tensors of the optimizers belong to no watched module.
        """
        owners = self._owners
        lost = [i for i, own in enumerate(self._owned) if own is None]
        first, self._looked_for_copies = not self._looked_for_copies, True
        if not lost:
            return (), 0
        known = {id(p): p for _, root in self.roots for p in root.parameters()}
        foreign = [t for t in tensors_of(self.optimizers) if id(t) not in known]
        if first and foreign:  # before the first step
            wanted = {i: t for i in lost if (t := self._tensors[i]) is not None and not self._kept[i]}
            self.copies = find_copies(wanted, foreign, [p for p in known.values() if p.requires_grad])
            self.look()
        if self._have_copies(lost):
            return (), len(foreign)
        shapes = [t.shape for t in foreign]
        replaced = []
        for i in lost:
            tensor, former = self._tensors[i], self._start_tensors[i]
            if former is not None and former is not tensor and id(former) in owners:
                replaced.append(i)
            elif tensor is not None and tensor.shape in shapes:
                shapes.remove(tensor.shape)
                replaced.append(i)
        return tuple(replaced), len(foreign)

    def _have_copies(self, lost: Sequence[int]) -> bool:
        """The tensors that nobody owns are stepped by copies, all of them."""
        copies = self.copies
        return copies is not None and all(
            self._kept[i] or (i in self._behind and self._tensors[i] is copies.tensors[i]) for i in lost
        )

    def trainable_bases(self) -> tuple[str, ...]:
        """Names of the expected layers whose base weight requires gradients."""
        trainable = {}
        for unit in self.units:
            weight = unit.layer.base_weight
            if weight is not None and weight.requires_grad:
                trainable[unit.layer.name] = id(weight)
        if not trainable:
            return ()
        shared = self._shared_weights()
        return tuple(name for name, weight in trainable.items() if weight not in shared)

    def packed(self) -> tuple[int, int]:
        """4-bit weights that bitsandbytes holds in its layout for inference, and all 4-bit weights.

        On CPUs with AVX512-BF16 a forward in eval mode without input gradients packs them, and every later
        forward goes through a kernel without a backward (bitsandbytes 0.50, nn/modules.py, Linear4bit.forward).

        Returns:
            Both counts.
        """
        states = [getattr(m.weight, "quant_state", None) for m in self._four_bit]
        return sum(bool(getattr(state, "packing_format_for_cpu", False)) for state in states), len(states)

    def _tied(self) -> set[int]:
        """Parameters that stand in several places: who uses one may mean another of them."""
        places: dict[int, int] = {}
        for parameter in (
            p for m in {m for _, root in self.roots for m in root.modules()} for p in m._parameters.values()
        ):
            places[id(parameter)] = places.get(id(parameter), 0) + 1
        return {parameter for parameter, count in places.items() if count > 1}

    def _shared_weights(self) -> set[int]:
        """Base weights that also stand somewhere without an adapter: a tied embedding that is meant to train."""
        under = {id(w) for u in self.inventory.units if (w := u.layer.base_weight) is not None}
        bases = {id(u.layer.module.get_base_layer()) for u in self.inventory.units if u.layer.lora}  # type: ignore[operator]
        return {
            id(p)
            for _, root in self.roots
            for m in root.modules()
            if id(m) not in bases
            for p in m._parameters.values()
            if p is not None and id(p) in under
        }

    # --- other adapters ---------------------------------------------------------------------

    def read_fingerprints(self, readout: Readout) -> range | None:
        """Put the norms of all adapters that must stay as they are into ``readout``."""
        tickets = [prints.read(readout) for prints in self._fingerprints.values()]
        return range(tickets[0].start, tickets[-1].stop) if tickets else None

    def other_facts(
        self, before: list[float] | None, after: list[float] | None, was_active: set[str]
    ) -> tuple[OtherAdapter, ...]:
        """The adapters that are not expected to train.

        Args:
            before: Their fingerprints before the last probed update, if read.
            after: The same directly after it.
            was_active: Names that were active in some forward.

        Returns:
            One fact an adapter.
        """
        if not self._others:
            return ()
        inside: dict[str, tuple[str, ...]] = {}  # changed by the step itself
        outside: dict[str, tuple[str, ...]] = {}  # changed at some other time
        offset = 0
        for name, prints in self._fingerprints.items():
            part = slice(offset, offset + prints.size)
            offset += prints.size
            if before is not None:
                outside[name] = prints.changed(before[part])
            if after is not None:
                (outside if before is None else inside)[name] = prints.changed(after[part])
        owners, active = self._owners, self.inventory.active
        facts = []
        for name, slots in self._others.items():
            tensors = [t for s in slots if (t := s.tensor) is not None]
            if inside.get(name) or outside.get(name):
                self.ever_changed.add(name)
            reference = name in self._reference
            facts.append(
                OtherAdapter(
                    name=name,
                    declared="reference" if reference else "lagged" if name in self._lagged else None,
                    tensors=len(tensors),
                    trainable=sum(t.requires_grad for t in tensors),
                    owned=sum(id(t) in owners for t in tensors),
                    changed=inside.get(name) or (outside.get(name, ()) if reference else ()),
                    was_active=name in was_active,
                    ever_changed=name in self.ever_changed,
                    active_now=name in active,
                    half=any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors),
                    **self.followers.counts(name),
                )
            )
        return tuple(facts)


def _used_instead(unit: Unit) -> torch.Tensor | None:
    """The weight that is in use where a unit's layer is passed by: its base's, or the original of a copy."""
    if isinstance(unit.layer.module, ModulesToSaveWrapper):
        weight = unit.layer.module.original_module._parameters.get("weight")
        return weight if isinstance(weight, torch.Tensor) else None
    return unit.layer.base_weight
