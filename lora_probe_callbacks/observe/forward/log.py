"""What the forwards of one step show: candidates, the calls inside them, and what ran beside training."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_probe_callbacks._gc import no_collection
from lora_probe_callbacks.facts import ForwardFacts, Mode
from lora_probe_callbacks.observe.forward.arrivals import Arrivals
from lora_probe_callbacks.observe.forward.candidate import Candidate, tensors_in
from lora_probe_callbacks.observe.forward.graph import (
    backwards_so_far,
    cut_by_checkpoint,
    mark,
    runs_to_all,
    walk,
    walk_from_here,
)
from lora_probe_callbacks.observe.forward.weight_usage import WeightWitness
from lora_probe_callbacks.observe.model.inventory import Inventory, Slot, Unit
from lora_probe_callbacks.observe.model.rows import by_row, dropout_is_off
from lora_probe_callbacks.observe.model.switches import Switches
from lora_probe_callbacks.observe.model.wrappers import describe

__all__ = ["ForwardLog"]

_WALKS = 4  # of the graphs of one kind of forward in one step


class ForwardLog:
    """Takes note of the forwards of one step.

    Args:
        hook: Makes a hook of a method and its first argument.
        on_error: Called with an exception of our own, which must not reach the user.
    """

    def __init__(
        self,
        hook: Callable[[Callable[..., None], object], Callable[..., None]],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self.witness: WeightWitness | None = None
        self.closely = True  # walk the graph of every forward, whether or not gradients show that it is whole
        self.bare = False  # only follow the steps, observe nothing: after an error of the probe, for the other ranks
        self.sharded = False  # the tensors inside a forward are not those outside
        self.traced = False  # hooks ended up inside a compiled region
        self.output_handles: list[RemovableHandle] = []
        self.tensors: Sequence[torch.Tensor | None] = ()  # of the slots, at the last look at them
        self.arrivals = Arrivals(on_error)
        self._hook = hook
        self._on_error = on_error
        self.begin()

    def begin(self) -> None:
        """A new step: forget what the last one showed."""
        self.arrivals.begin()
        self.candidates: list[Candidate] = []
        self.without_grad = 0
        self.active_seen: set[str] = set()
        self.merged_seen = False
        self.beside: set[Mode] = set()  # states in which layers ran beside training: no gradients, or disabled
        self.ran_beside: set[int] = set()  # units whose layer ran there
        self._backwards: int | None = None  # up to the first forward
        self._walked: dict[tuple[str, tuple[Mode, ...]], list[Candidate]] = {}

    def watch(self, inventory: Inventory, units: list[Unit]) -> None:
        """Say what is expected to train.

        Args:
            inventory: The adapted layers and the modules above them.
            units: The units that are expected to train.
        """
        self.inventory = inventory
        self.units = units
        self.arrivals.watch([partial(_shown, slot) for unit in units for slot in unit.slots])
        self._units_of: dict[int, list[int]] = {}
        for index, unit in enumerate(units):
            self._units_of.setdefault(id(unit.layer.called), []).append(index)
        self._switches = Switches(inventory, units)
        starts = itertools.accumulate((len(unit.slots) for unit in units), initial=0)
        self._first_slot = list(starts)[: len(units)]
        names = [unit.layer.name for unit in units]
        self._above_expected = {
            id(module)
            for name, module, _ in inventory.ancestors
            if any(n == name or n.startswith(f"{name}." if name else "") for n in names)
        } | {id(unit.layer.module) for unit in units}

    # --- as they happen ---------------------------------------------------------------------

    def outside_training(self, module: nn.Module) -> None:
        """An outermost call without gradients."""
        self.without_grad += 1
        self.active_seen.update(self.state()[1])
        self.merged_seen |= self._switches.merged
        self.note_beside(module)

    def new_candidate(self, name: str, module: nn.Module, inputs: object) -> Candidate:
        """An outermost call with gradients, and what it was given."""
        if self.bare:
            candidate = Candidate("", (), (), False, set(), holds_expected=False)
            self.candidates.append(candidate)
            return candidate
        modes, active = self.state()
        observable = not any(unit.layer.compiled for unit in self.units)
        candidate = Candidate(
            module=describe(name, module),
            modes=modes,
            active=active,
            observed=observable,
            with_grad=set(),
            holds_expected=id(module) in self._above_expected,
            inputs=[weakref.ref(t) for t in tensors_in(inputs)],
        )
        # What stands above adapted layers alone: blocks, as a rule.
        blocks = (m for _, m, _ in self.inventory.ancestors if getattr(m, "gradient_checkpointing", False) is True)
        candidate.unchecked = sum(not block.training for block in blocks)
        self.active_seen.update(candidate.active)
        self.merged_seen |= "merged" in candidate.modes
        self.candidates.append(candidate)
        self.note_call(candidate, module)
        return candidate

    def note_call(self, candidate: Candidate, module: nn.Module) -> None:
        """A module is called inside a candidate."""
        candidate.called.add(id(module))
        if not candidate.observed:
            return
        units = self._units_of.get(id(module))
        if units is None:
            return
        graded = torch.is_grad_enabled()
        names, offsets = by_row(module)
        if offsets is not None:
            candidate.without_token = max(candidate.without_token, sum(o is None for o in offsets))
            candidate.rows.update(dict.fromkeys((self.units[i].adapter for i in units), _found(offsets)))
        for index in units:
            unit = self.units[index]
            candidate.total_calls[index] = candidate.total_calls.get(index, 0) + 1
            mode = self._switches.mode(index)
            if names is not None and mode in ("active", "inactive"):  # PEFT asks the batch, not the layer
                candidate.rows[unit.adapter] = (names.count(unit.adapter), len(names))
                mode = "active" if unit.adapter in names else "inactive"
            if mode == "active" and dropout_is_off(unit):
                candidate.in_eval.add(index)
            if graded:
                candidate.with_grad.add(index)
            elif self.closely and cut_by_checkpoint():
                candidate.cut.add(index)
            if mode == "active":
                candidate.active_calls[index] = candidate.active_calls.get(index, 0) + 1
            else:
                candidate.odd[index] = mode
            if self.sharded:
                shown = (slot.shown for slot in self.units[index].slots)
                for slot, tensor in enumerate(shown, start=self._first_slot[index]):
                    if tensor is None:  # FSDP1 shows a view of its flat parameter, and the graph ends in that
                        candidate.why_unknown = "parameters are views of flat ones inside the forward"
                    else:
                        candidate.inside[id(tensor)] = slot

    def note_beside(self, module: nn.Module) -> None:
        """A module is called in a forward without gradients."""
        for index in self._units_of.get(id(module), ()):
            self.ran_beside.add(index)
            self.beside.add(self._switches.mode(index))

    def finish(self, candidate: Candidate, output: Any) -> None:
        """A candidate has returned: follow its outputs to the backward."""
        outputs = [t for t in tensors_in(output) if t.requires_grad]
        key = (candidate.module, candidate.modes)
        candidate.carries_graph = bool(outputs)
        if self._backwards is None and not self.bare:
            self._backwards = backwards_so_far()
        alike = self._walked.setdefault(key, [])
        # One walk serves all micro-batches of the same kind, but none serves that was not for training.
        if not self.bare and len(alike) < _WALKS and not any(c.received for c in alike):
            alike.append(candidate)
            if not outputs:
                candidate.leaves, candidate.why_unknown = set(), None
            elif self.closely or self.sharded:
                candidate.reaches(walk(outputs))
            else:
                candidate.to_walk = True
        for tensor in outputs:
            mark(tensor, candidate)
            handle = tensor.register_hook(self._hook(self._receive, candidate))  # type: ignore[no-untyped-call]
            self.output_handles.append(handle)

    def _receive(self, candidate: Candidate, grad: torch.Tensor | None) -> None:
        # An output of a compiled region that this loss does not use, or under DDP's find_unused_parameters.
        if grad is None:
            return
        if grad.numel() == 1 and grad.dtype != torch.float16:  # 65536 overflows in float16, and scaling cures it
            candidate.cotangent = grad.detach()
        if candidate.received:
            return
        candidate.received = True
        if self.witness is not None:
            self.witness.paused = True  # whoever reads a weight from now on does not make this loss with it
        if self.bare:
            return
        try:
            with no_collection():
                self.arrivals.backward_begins(candidate.inputs)
            candidate.modes_at_backward, candidate.active_at_backward = self.state()
            if candidate.to_walk:
                self._see_plan(candidate)
        except Exception as error:
            self._on_error(error)

    def _see_plan(self, candidate: Candidate) -> None:
        # Of the last look: a tensor that was exchanged since then is in no plan, and the graph is walked.
        leaves = [t for t in self.tensors if t is not None and t.requires_grad]
        if runs_to_all(leaves):
            candidate.leaves = set(map(id, leaves))
        else:
            candidate.reaches(walk_from_here())

    # --- facts ------------------------------------------------------------------------------

    def state(self) -> tuple[tuple[Mode, ...], tuple[str, ...]]:
        """The state of every expected unit at this moment, and the names of the active adapters of all layers."""
        return self._switches.state()

    def facts(self, slot_of: dict[int, int]) -> ForwardFacts:
        """What was seen since the step began; ``slot_of`` maps a tensor's id to its slot."""
        return ForwardFacts(
            forwards=tuple(candidate.fact(slot_of) for candidate in self.candidates),
            forwards_without_grad=self.without_grad,
            ran_beside=frozenset(self.ran_beside),
            unobservable=self.unobservable,
            backward_called=self._backward_called(),
        )

    def _backward_called(self) -> bool | None:
        """Since the first forward of this step; None where nobody looked."""
        if any(c.received for c in self.candidates):
            return True
        now = None if self._backwards is None else backwards_so_far()
        return None if now is None or self._backwards is None else now > self._backwards + 1

    @property
    def unobservable(self) -> str | None:
        """Why no forward can be seen, or None."""
        if self.traced:
            return "the model is called from compiled code: its forwards cannot be watched, the gradients decide"
        if self.units and all(unit.layer.compiled for unit in self.units) and not self.candidates:
            return "the model is compiled as a whole: its forwards cannot be watched, the gradients decide"
        return None

    def cotangents(self) -> list[torch.Tensor]:
        """The gradients that arrived at outputs of one element."""
        return [c.cotangent for c in self.candidates if c.cotangent is not None]

    def called(self) -> set[int]:
        """Ids of all modules that ran in a candidate that received a gradient."""
        return set().union(*(c.called for c in self.candidates if c.received))


def _found(offsets: Sequence[object]) -> tuple[int, int]:
    """Rows in which aLoRA found its invocation tokens, and all rows."""
    return sum(offset is not None for offset in offsets), len(offsets)


def _shown(slot: Slot) -> torch.Tensor | None:
    return slot.shown
