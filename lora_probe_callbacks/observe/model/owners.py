"""Who owns the expected tensors: one look at the slots and at the optimizers, and what follows from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter, is_

import numpy as np
import torch

from lora_probe_callbacks.facts import Bools, CopiesFact, Slots
from lora_probe_callbacks.observe.device.batching import Held, held
from lora_probe_callbacks.observe.device.transfer import PLAIN, Kind, kind, local
from lora_probe_callbacks.observe.model.master_weights import Copies, find_copies
from lora_probe_callbacks.observe.model.ownership import groups_of, owner_of, tensors_of
from lora_probe_callbacks.observe.model.targets import Targets
from lora_probe_callbacks.observe.model.wrappers import is_shard, master_copies, replicas

__all__ = ["Owners"]


_LOOKED_AT = 16  # tensors, between two probed steps: parts are thawed and frozen together


class Owners:
    """Which tensors the slots hold, and which optimizer owns each. What is asked between two looks is of the last one.

    Args:
        targets: What is expected to train.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._trainable: object = None  # what thawed() has seen
        self._shared = False  # some tensor stands in several groups
        self._took_over: list[int] = []  # optimizers, the last one last
        self.inside_forward = False  # a module has been called: its tensors may be stand-ins
        self.copies: Copies | None = None
        self.settle()

    def settle(self) -> None:
        """Begin anew with the slots that are expected now."""
        targets = self._targets
        self.copies, self._looked_for_copies = None, False
        slots, units = targets.slots, targets.units
        self._frozen = np.array([targets.is_frozen(slot) for slot in slots], np.bool_)
        self._role = np.array([slot.role for slot in slots], "<U5")
        self._unit = np.repeat(np.arange(len(units)), [len(unit.slots) for unit in units])
        self._words = (
            tuple(slot.name for slot in slots),
            tuple(slot.adapter for slot in slots),
            tuple(slot.path[0] for slot in slots),
        )
        self.tensors: list[torch.Tensor | None] = []  # of the last look
        self._looked: tuple[object, object] = None, None
        self._params: list[torch.Tensor] = []  # of all groups, at the last look
        self._sizes: list[list[int]] | None = None
        self._kinds: list[Kind | None] | None = None
        self._columns = Slots.none()
        self.look()

    # --- looking ----------------------------------------------------------------------------

    def look(self) -> None:
        """See which tensors the slots hold now, and who owns them."""
        self._look_at_groups()
        tensors = self._targets.tensors()
        if self.inside_forward and len(tensors) == len(self.tensors):
            tensors = [self._behind_stand_in(now, then) for now, then in zip(tensors, self.tensors, strict=True)]
        known = self._group_of is self._looked[0] and self.copies is self._looked[1]
        if not known or len(tensors) != len(self.tensors) or not all(map(is_, tensors, self.tensors)):
            self.tensors, self._looked = tensors, (self._group_of, self.copies)
            self._learn()
        self._look_at_kinds()

    def _learn(self) -> None:
        """Other tensors, or other owners, than at the last look."""
        tensors = self.tensors
        self._plain = all(type(t) in PLAIN for t in tensors)  # all are there, and none is in shards
        self._slot_of = {id(t): i for i, t in enumerate(tensors) if t is not None}
        find = self._group_of.get
        behind = {} if self.copies is None else {i: find(id(t), -1) for i, t in self.copies.holders.items()}
        self._behind = {i: group for i, group in behind.items() if group >= 0}
        of_group = np.array([*(group.optimizer for group in self._groups), -1])
        self._own_group = np.array([find(id(t), -1) for t in tensors], np.int64)
        self._own = of_group[self._own_group]  # optimizer by slot, -1 without one
        self._step_group = self._own_group.copy()  # of the tensor itself, or of its copy
        for slot, group in self._behind.items():
            if self._step_group[slot] < 0:
                self._step_group[slot] = group
        owning = {int(o) for o in of_group[self._step_group] if o >= 0}
        self._owning = owning or set(range(len(self._targets.optimizers)))
        self._of: dict[tuple[int, bool], dict[int, torch.Tensor]] = {}  # see of_optimizer()
        self._held: dict[tuple[int, bool], Held] = {}

    def _look_at_kinds(self) -> None:
        """An assignment to ``.data`` gives a tensor another shape or type, and leaves the object."""
        self._kinds_known = True
        tensors = self.tensors if self._plain else [t if t is None else local(t) for t in self.tensors]
        kinds = [None if t is None else kind(t) for t in tensors]
        if kinds != self._kinds:
            self._held.clear()
            self._kinds, self._columns = kinds, self._of_kinds(kinds)

    def _look_at_groups(self) -> None:
        """Owners are worked out anew only where a group holds other objects than at the last look."""
        optimizers = self._targets.optimizers
        params, sizes = tensors_of(optimizers), self._group_sizes()
        if sizes != self._sizes or not all(map(is_, params, self._params)):
            self._params, self._sizes = params, sizes
            self._shared = len(set(map(id, params))) < len(params)
            self._group_of = owner_of(optimizers, self._took_over)
        self._groups = groups_of(optimizers)

    def has_stepped(self, optimizer: int, stepped: Collection[int]) -> bool:
        """An optimizer has stepped: does it take over what it shares with others, none of which is in ``stepped``?"""
        if not self._shared:
            return False
        groups = self._groups
        held = {id(t) for group in self._targets.optimizers[optimizer].param_groups for t in group["params"]}
        mine = [g for t in self.tensors if id(t) in held and (g := self._group_of.get(id(t))) is not None]
        former = {groups[g].optimizer for g in mine} - {optimizer}
        if not former or former & set(stepped):
            return False
        self._took_over = [o for o in self._took_over if o != optimizer] + [optimizer]
        self._sizes = None
        self.look()
        return True

    def _behind_stand_in(self, now: torch.Tensor | None, before: torch.Tensor | None) -> torch.Tensor | None:
        """torch.func.functional_call puts others in the place of what an optimizer owns, for one forward."""
        return before if id(now) not in self._group_of and id(before) in self._group_of else now

    def _group_sizes(self) -> list[list[int]]:
        return [[len(group["params"]) for group in optimizer.param_groups] for optimizer in self._targets.optimizers]

    def owning(self) -> set[int]:
        """The optimizers that own expected tensors; all of them if none does.

        Asked in every step: between looks, only the sizes of the groups tell that something has changed.

        Returns:
            Their numbers.
        """
        if self._group_sizes() != self._sizes:
            self.look()
        return self._owning

    def thawed(self) -> bool:
        """Something may train now that did not at the last call, or the other way round: asked in every step."""
        step = max(1, len(self.tensors) // _LOOKED_AT)
        now = self._group_sizes(), [t is not None and t.requires_grad for t in self.tensors[::step]]
        before, self._trainable = self._trainable, now
        return before is not None and before != now

    def has_gradients(self, optimizer: int) -> bool:
        """Some tensor of an optimizer has a gradient."""
        return any(t.grad is not None for t in tensors_of([self._targets.optimizers[optimizer]]))

    def one_of_each(self, learning: Bools) -> dict[int, torch.Tensor]:
        """Optimizer to one of the tensors that it steps.

        Args:
            learning: Slots that are known to get gradients: these first.

        Returns:
            A tensor of the model that requires gradients, where there is one.
        """
        of_group = np.array([*(group.optimizer for group in self._groups), -1])
        owner, intended = of_group[self._step_group], ~self._frozen
        found: dict[int, torch.Tensor] = {}
        for optimizer in self._owning:
            mine = intended & (owner == optimizer)
            first = next((s for s in (mine & learning, mine & (self._role != "A"), mine) if s.any()), mine)
            tensors = (self.tensors[slot] for slot in np.flatnonzero(first).tolist())
            tensor = next((t for t in tensors if t is not None and t.requires_grad), None)
            if tensor is not None:
                found[optimizer] = tensor
        return found

    def others_train(self) -> bool:
        """Some tensor of an optimizer that stands in no slot requires gradients."""
        mine = {id(t) for t in self.tensors}
        return any(t.requires_grad and id(t) not in mine for t in self._params)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Some optimizer holds this very object."""
        return id(tensor) in self._group_of

    # --- the tensors ------------------------------------------------------------------------

    def of_optimizer(self, optimizer: int, *, unowned: bool = False) -> Mapping[int, torch.Tensor]:
        """Slots whose tensors an optimizer owns, and on request those that nobody owns."""
        unowned = unowned and bool((self._own < 0).any())
        found = self._of.get((optimizer, unowned))
        if found is None:
            chosen = self._own == optimizer
            chosen = chosen | (self._own < 0) if unowned else chosen
            there = ((i, self.tensors[i]) for i in np.flatnonzero(chosen).tolist())
            found = self._of[optimizer, unowned] = {i: t for i, t in there if t is not None}
        return found

    def held(self, optimizer: int, *, unowned: bool = False) -> Held:
        """The same, grouped for reading. For use under ``no_grad``."""
        if not self._kinds_known:
            self._look_at_kinds()
        which = (optimizer, unowned and bool((self._own < 0).any()))
        if which not in self._held:
            self._held[which] = held(self.of_optimizer(optimizer, unowned=unowned))
        return self._held[which]

    def forget_kinds(self) -> None:
        """A step was made, and user code runs until the next one: what is held may be of other kinds by then."""
        self._kinds_known = False

    def whole(self) -> dict[int, torch.Tensor]:
        """Slots that are meant to train and of which this rank holds all."""
        intended = enumerate(zip(self.tensors, self._frozen.tolist(), strict=True))
        return {i: t for i, (t, frozen) in intended if t is not None and not frozen and not is_shard(t)}

    def shards(self) -> dict[int, float]:
        """Slots of which this rank holds a part, and by how many ranks that part is held, inverted."""
        return {i: 1 / replicas(t) for i, t in enumerate(self.tensors) if t is not None and is_shard(t)}

    # --- facts ------------------------------------------------------------------------------

    def columns(self) -> Slots:
        """Every expected slot as it is now."""
        owner = np.array([*(group.optimizer for group in self._groups), -1], np.int64)
        rate = np.array([*(group.learning_rate for group in self._groups), np.nan], np.float64)
        decay = np.array([*(group.weight_decay for group in self._groups), np.nan], np.float64)
        if self._plain:
            requires_grad = np.array(list(map(attrgetter("requires_grad"), self.tensors)), np.bool_)
        else:
            requires_grad = np.array([t is not None and t.requires_grad for t in self.tensors], np.bool_)
        of = self._step_group
        self._columns = self._columns.with_state(requires_grad, owner[of], rate[of], decay[of])
        return self._columns

    def _of_kinds(self, kinds: Sequence[Kind | None]) -> Slots:
        """What follows from names, types and sizes."""
        name, adapter, part = self._words
        halves, size = (torch.float16, torch.bfloat16), len(kinds)
        return Slots(
            name=name,
            adapter=adapter,
            part=part,
            role=self._role,
            unit=self._unit,
            frozen_by_intent=self._frozen,
            requires_grad=np.zeros(size, np.bool_),
            owner=np.full(size, -1),
            rate=np.full(size, np.nan),
            weight_decay=np.full(size, np.nan),
            half=np.array([k is not None and k[1] in halves for k in kinds], np.bool_),
            numel=np.array([0 if k is None else k[2].numel() for k in kinds], np.int64),
        )

    def why_not_owned(self) -> str:
        """Say why no tensor of the adapter can be told apart in the optimizer, or give the empty string.

        Returns:
            The reason.
        """
        if (self._step_group >= 0).any():
            return ""
        return master_copies(root for _, root in self._targets.roots)

    def vanished(self) -> tuple[str, ...]:
        """Names of tensors that an optimizer steps although their layer has left the model."""
        left = self._targets.left
        if not left:
            return ()
        held = {id(p) for _, root in self._targets.roots for p in root.parameters()}
        return tuple(name for name, t in left.items() if self.owns(t) and id(t) not in held)

    def replaced(self) -> tuple[tuple[int, ...], int]:
        """Slots whose former tensor, or a twin of it, is what an optimizer holds.

        Returns:
            The slots, and how many tensors of the optimizers belong to no watched module.
        """
        lost: list[int] = np.flatnonzero(self._own < 0).tolist()
        first, self._looked_for_copies = not self._looked_for_copies, True
        if not lost:
            return (), 0
        known = {id(p): p for _, root in self._targets.roots for p in root.parameters()}
        foreign = [t for t in tensors_of(self._targets.optimizers) if id(t) not in known]
        if first and foreign:  # before the first step
            wanted = {i: t for i in lost if (t := self.tensors[i]) is not None and not self._frozen[i]}
            self.copies = find_copies(wanted, foreign, [p for p in known.values() if p.requires_grad])
            self.look()
        if self._have_copies(lost):
            return (), len(foreign)
        return tuple(self._with_twins(lost, foreign)), len(foreign)

    def _with_twins(self, lost: Sequence[int], foreign: Sequence[torch.Tensor]) -> list[int]:
        shapes = [t.shape for t in foreign]
        found = []
        for i in lost:
            tensor, former = self.tensors[i], self._targets.start_tensors[i]
            if former is not None and former is not tensor and self.owns(former):
                found.append(i)
            elif tensor is not None and tensor.shape in shapes:
                shapes.remove(tensor.shape)
                found.append(i)
        return found

    def _have_copies(self, lost: Sequence[int]) -> bool:
        """The tensors that nobody owns are stepped by copies, all of them."""
        copies = self.copies
        return copies is not None and all(
            self._frozen[i] or (i in self._behind and self.tensors[i] is copies.tensors[i]) for i in lost
        )

    def copies_fact(self) -> CopiesFact | None:
        """What became of the copies that an optimizer steps for the adapter; None where there are none, or others."""
        lost = np.flatnonzero(self._own < 0).tolist()
        return self.copies.fact() if self.copies is not None and (not lost or self._have_copies(lost)) else None

    def seen(self) -> dict[int, int]:
        """Tensor id to slot, as of the last look."""
        return self._slot_of
