"""Watch the forwards of one step through torch's own hooks.

A **candidate** is a call of an outermost module with gradients enabled, outside any backward.
It becomes a training forward when its output receives a gradient. Layers inside inherit that
classification: in a reentrant checkpoint they run under no_grad, and every checkpoint runs them
again inside the backward.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from lora_probe_callbacks.facts import ForwardFact, Mode
from lora_probe_callbacks.observe.device.token_rows import TokenRows
from lora_probe_callbacks.observe.forward.graph import (
    Walk,
    capturing,
    in_backward,
    mark,
    runs_to_all,
    walk,
    walk_from_here,
)
from lora_probe_callbacks.observe.forward.weight_usage import WeightWitness
from lora_probe_callbacks.observe.model.inventory import Inventory, Unit
from lora_probe_callbacks.observe.model.wrappers import describe, hooks_fire

__all__ = ["Candidate", "ForwardObserver", "tensors_in"]

_WALKS = 4  # of the graphs of one kind of forward in one step


@dataclass(eq=False, slots=True)
class Candidate:
    """One outermost call with gradients enabled, as it is being observed."""

    module: str
    modes: tuple[Mode, ...]
    active: tuple[str, ...]
    calls: list[tuple[int, int, Mode | None]] | None
    with_grad: set[int]  # units whose layer ran with gradients enabled
    holds_expected: bool
    received: bool = False
    carries_graph: bool = True  # some output requires gradients
    modes_at_backward: tuple[Mode, ...] | None = None
    active_at_backward: tuple[str, ...] | None = None
    leaves: set[int] | None = None
    dropped: set[int] = field(default_factory=set)  # leaves behind an operation without a backward
    why_unknown: str | None = None
    cotangent: torch.Tensor | None = None  # of an output of one element: the loss, as a rule
    called: set[int] = field(default_factory=set)  # ids of the modules that ran inside
    to_walk: bool = False  # when a gradient arrives, and only where the engine will not come to all slots by itself
    inside: dict[int, int] = field(default_factory=dict)  # tensor id to slot, as a sharded model shows them inside

    def reaches(self, found: Walk) -> None:
        """Enter what its graph leads to."""
        self.leaves, self.dropped = set(found.leaves), found.dropped
        self.why_unknown = self.why_unknown or found.blind

    def fact(self, slot_of: dict[int, int]) -> ForwardFact:
        """What the checks may know of it; ``slot_of`` maps a tensor's id to its slot."""
        reached = None
        slots = {**slot_of, **self.inside}
        if self.leaves is not None and self.why_unknown is None:
            reached = frozenset(slots[i] for i in self.leaves if i in slots)
        return ForwardFact(
            module=self.module,
            received=self.received,
            modes=self.modes,
            active=self.active,
            modes_at_backward=self.modes_at_backward,
            active_at_backward=self.active_at_backward,
            calls=None if self.calls is None else tuple(self.calls),
            holds_expected=self.holds_expected,
            carries_graph=self.carries_graph,
            with_grad=None if self.calls is None else frozenset(self.with_grad),
            reached=reached,
            why_unknown=self.why_unknown,
            dropped=frozenset(slots[i] for i in self.dropped if i in slots),
        )


@dataclass(frozen=True, slots=True)
class _Frame:
    """The call of an outermost module that a thread is in."""

    module: nn.Module
    candidate: Candidate | None
    outer_error: BaseException | None  # was being handled when it began
    outer: _Frame | None


class _Hook:
    """A method of an observer as a hook that copies and pickles as one that does nothing.

    ``copy.deepcopy(model)`` and ``torch.save(model)`` in the middle of a step take the hooks along:
    the copy must neither drag the observer with it nor report to it.
    """

    __torch_unserializable__ = True  # torch warns of other hooks when a tensor that has one is saved

    def __init__(self, observer: ForwardObserver, method: Callable[..., Any], first: object) -> None:
        self._observer, self._method, self._first = observer, method, first

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            # A function that was compiled somewhere else calls the model: dynamo must find nothing here to trace.
            self._observer.traced = True
            return None
        return self._method(self._first, *args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _inert, ()

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return _nothing


def _nothing(*args: Any) -> None:
    """Stand where a hook of the probe was when the module was copied."""


def _inert() -> Callable[..., None]:
    return _nothing


class ForwardObserver:
    """The hooks of one probed step on the modules above and around the adapters.

    Args:
        before: Called when a candidate is about to run. What it raises ends the forward.
        after: Called when a candidate has run; returns the output to hand on.
        on_error: Called with an exception of the observer's own, which must not reach the user.
    """

    def __init__(
        self,
        *,
        before: Callable[[nn.Module], None],
        after: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any] | None,
        on_error: Callable[[BaseException], None],
    ) -> None:
        self.candidates: list[Candidate] = []
        self.without_grad = 0
        self.active_seen: set[str] = set()
        self.merged_seen = False
        self.beside: set[Mode] = set()  # states in which layers ran beside training: no gradients, or disabled
        self.witness: WeightWitness | None = None
        self.paused = False  # while the probe itself runs the model
        self.closely = True  # walk the graph of every forward, whether or not gradients show that it is whole
        self.bare = False  # only follow the steps, observe nothing: after an error of the probe, for the other ranks
        self.sharded = False  # the tensors inside a forward are not those outside
        self.token_rows: list[TokenRows] = []  # of new tokens, in the embeddings that read them
        self.traced = False  # hooks ended up inside a compiled region
        self._before = before
        self._after = after
        self._on_error = on_error
        self._handles: list[tuple[nn.Module, RemovableHandle]] = []
        self._outermosts: set[int] = set()  # ids of the modules that tell when they are left
        self._complete = False  # all hooks of a step are in place
        self._output_handles: list[RemovableHandle] = []
        self._thread = threading.local()
        self._found: tuple[ForwardFact, ...] = ()
        self._walked: dict[tuple[str, tuple[Mode, ...]], list[Candidate]] = {}

    def watch(self, inventory: Inventory, units: list[Unit]) -> None:
        """Say what to observe. May be called in the middle of a step, hooks move with it.

        Args:
            inventory: The adapted layers and the modules above them.
            units: The units that are expected to train.
        """
        armed = self.armed
        self.disarm()
        self.inventory = inventory
        self.units = units
        self._units_of: dict[int, list[int]] = {}
        for index, unit in enumerate(units):
            self._units_of.setdefault(id(unit.layer.called), []).append(index)
        self._switches: Sequence[tuple[object, ...]] | None = None
        self._state: tuple[tuple[Mode, ...], tuple[str, ...]] = ((), ())
        starts = itertools.accumulate((len(unit.slots) for unit in units), initial=0)
        self._first_slot = list(starts)[: len(units)]
        names = [unit.layer.name for unit in units]
        self._above_expected = {
            id(module)
            for name, module, _ in inventory.ancestors
            if any(n == name or n.startswith(f"{name}." if name else "") for n in names)
        } | {id(unit.layer.module) for unit in units}
        if armed:
            self.arm()

    @property
    def armed(self) -> bool:
        """Hooks are installed."""
        return bool(self._handles)

    def hook(self, method: Callable[..., None], first: object) -> Callable[..., None]:
        """A hook for a tensor, as copyable and as blind to compilers as those on the modules."""
        return _Hook(self, method, first)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """See nothing of what the probe itself runs inside."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def reset(self) -> None:
        """Forget what the last step showed."""
        self.candidates, self.without_grad, self._walked = [], 0, {}
        self.active_seen, self.merged_seen, self.beside = set(), False, set()
        self._thread = threading.local()
        self.close_witness()
        self.witness = None

    def arm(self) -> None:
        """Install the hooks of one step; those of the step before it may stay."""
        for rows in self.token_rows:
            rows.begin()
        if self._complete and not self.traced:
            self._let_outputs_go()
            return
        self.disarm()
        if self.traced:
            return
        self._complete = True
        hooked: set[int] = set()
        for name, module, inside in self.inventory.ancestors:
            if inside or not hooks_fire(module):
                continue
            hooked.add(id(module))
            self._hook(module, name)
        for layer in self.inventory.layers:
            if layer.compiled:
                continue
            if id(layer.called) not in hooked:
                hooked.add(id(layer.called))
                self._hook(layer.called, layer.name)
        self._hook_tables()

    def watch_tokens(self, rows: list[TokenRows]) -> None:
        """Watch embeddings as well, from the forward on that is about to run."""
        self.token_rows = rows
        if self.armed:
            self._hook_tables()

    def _hook_tables(self) -> None:
        for rows in self.token_rows:
            hook = rows.table.register_forward_hook(_Hook(self, self._embedded, rows))
            self._handles.append((rows.table, hook))

    def _hook(self, module: nn.Module, name: str) -> None:
        # fully_shard gathers parameters in a pre-hook of its own: the tensors are looked at before it.
        hook = _Hook(self, self._enter, name)
        prepend = isinstance(module, FSDPModule)
        self._handles.append((module, module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend)))

    def disarm(self, inside: nn.Module | None = None) -> None:
        """Remove every hook.

        Args:
            inside: A module whose own hooks are being run at this moment. Taking an entry out of
                that dictionary would break torch's iteration over it unless the entry is the last.
        """
        kept = []
        for module, handle in self._handles:
            if module is inside and not _is_last(module, handle):
                kept.append((module, handle))
            else:
                handle.remove()
        self._handles = kept
        self._outermosts.clear()
        self._complete = False
        self._let_outputs_go()
        self.close_witness()

    def _let_outputs_go(self) -> None:
        for handle in self._output_handles:
            handle.remove()
        self._output_handles.clear()

    def close_witness(self) -> None:
        """End the watch over operations, on the thread that began it."""
        if self.witness is not None:
            self.witness.close()

    # --- hooks ------------------------------------------------------------------------------

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.paused or in_backward():
            return
        frame: _Frame | None = getattr(self._thread, "frame", None)
        # The module of the frame again: it calls itself, or that forward ended in a BaseException, which calls no hook.
        if frame is not None and frame.module is not module:
            if frame.candidate is None:
                self._note_beside(module)
            else:
                try:
                    self._note_call(frame.candidate, module)
                except Exception as error:
                    self._on_error(error)
            return
        self._outermost(name, module)

    def _outermost(self, name: str, module: nn.Module) -> None:
        outer_error = sys.exc_info()[1]
        candidate = None
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            self.without_grad += 1
            self.active_seen.update(self.inventory.active)
            self.merged_seen |= any(layer.merged for layer in self.inventory.layers)
            self._note_beside(module)
        elif not capturing():
            try:
                self._before(module)
            except BaseException:
                self.disarm()
                raise
            if not self.armed:
                return
            try:
                candidate = self._new_candidate(name, module)
            except Exception as error:
                self._on_error(error)
            if self.witness is not None:
                self.witness.paused = False
                self.witness.open()
        self._thread.frame = _Frame(module, candidate, outer_error, getattr(self._thread, "frame", None))
        if id(module) not in self._outermosts:  # the other modules need no second hook
            self._outermosts.add(id(module))
            hook = _Hook(self, self._leave, name)
            self._handles.append((module, module.register_forward_hook(hook, with_kwargs=True, always_call=True)))

    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        frame: _Frame | None = getattr(self._thread, "frame", None)
        if self.paused or in_backward() or frame is None or frame.module is not module:
            return None
        self._thread.frame = frame.outer
        candidate, error = frame.candidate, sys.exc_info()[1]
        if error is not None and error is not frame.outer_error:
            self.disarm(inside=module)
            return None
        if candidate is not None:
            try:
                self._finish(candidate, output)
                if self._after is not None:
                    return self._after(module, args, kwargs, output)
            except Exception as failure:
                self._on_error(failure)
        return None

    def _embedded(self, rows: TokenRows, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame: _Frame | None = getattr(self._thread, "frame", None)
        if self.paused or in_backward() or frame is None or frame.candidate is None or not args:
            return
        if isinstance(output, torch.Tensor) and output.requires_grad and isinstance(args[0], torch.Tensor):
            hook = _Hook(self, self._came_to, (rows, args[0]))
            self._output_handles.append(output.register_hook(hook))  # type: ignore[no-untyped-call]

    def _came_to(self, where: tuple[TokenRows, torch.Tensor], gradient: torch.Tensor | None) -> None:
        rows, ids = where
        try:
            if gradient is not None:
                rows.came(ids, gradient)
        except Exception as error:
            self._on_error(error)

    def _new_candidate(self, name: str, module: nn.Module) -> Candidate:
        if self.bare:
            candidate = Candidate("", (), (), None, set(), holds_expected=False)
            self.candidates.append(candidate)
            return candidate
        modes, active = self.state()
        observable = not any(unit.layer.compiled for unit in self.units)
        candidate = Candidate(
            module=describe(name, module),
            modes=modes,
            active=active,
            calls=[(0, 0, None)] * len(self.units) if observable else None,
            with_grad=set(),
            holds_expected=id(module) in self._above_expected,
        )
        self.active_seen.update(candidate.active)
        self.merged_seen |= "merged" in candidate.modes
        self.candidates.append(candidate)
        self._note_call(candidate, module)
        return candidate

    def _note_call(self, candidate: Candidate, module: nn.Module) -> None:
        candidate.called.add(id(module))
        if candidate.calls is None:
            return
        units = self._units_of.get(id(module))
        if units is None:
            return
        graded = torch.is_grad_enabled()
        for index in units:
            unit = self.units[index]
            good, total, bad = candidate.calls[index]
            mode = unit.layer.mode(unit.adapter)
            if graded:
                candidate.with_grad.add(index)
            if mode == "active":
                candidate.calls[index] = (good + 1, total + 1, bad)
            else:
                candidate.calls[index] = (good, total + 1, mode)
            if self.sharded:
                for slot, tensor in enumerate((s.shown for s in unit.slots), start=self._first_slot[index]):
                    if tensor is None:  # FSDP1 shows a view of its flat parameter, and the graph ends in that
                        candidate.why_unknown = "parameters are views of flat ones inside the forward"
                    else:
                        candidate.inside[id(tensor)] = slot

    def _note_beside(self, module: nn.Module) -> None:
        for index in self._units_of.get(id(module), ()):
            self.beside.add(self.units[index].layer.mode(self.units[index].adapter))

    def _finish(self, candidate: Candidate, output: Any) -> None:
        outputs = [t for t in tensors_in(output) if t.requires_grad]
        key = (candidate.module, candidate.modes)
        candidate.carries_graph = bool(outputs)
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
            handle = tensor.register_hook(_Hook(self, self._receive, candidate))  # type: ignore[no-untyped-call]
            self._output_handles.append(handle)

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
            candidate.modes_at_backward, candidate.active_at_backward = self.state()
            if candidate.to_walk:
                self._see_plan(candidate)
        except Exception as error:
            self._on_error(error)

    def _see_plan(self, candidate: Candidate) -> None:
        leaves = [t for unit in self.units for slot in unit.slots if (t := slot.shown) is not None and t.requires_grad]
        if runs_to_all(leaves):
            candidate.leaves = set(map(id, leaves))
        else:
            candidate.reaches(walk_from_here())

    # --- facts ------------------------------------------------------------------------------

    def state(self) -> tuple[tuple[Mode, ...], tuple[str, ...]]:
        """The state of every expected unit at this moment, and the names of the active adapters of all layers."""
        switches = [(layer.disabled, *layer.merged, None, *layer.active) for layer in self.inventory.layers]
        if switches != self._switches:  # asked three times a step, and they hardly ever move
            self._switches = switches
            modes = tuple(unit.layer.mode(unit.adapter) for unit in self.units)
            self._state = (modes, self.inventory.active)
        return self._state

    def facts(self, slot_of: dict[int, int]) -> tuple[ForwardFact, ...]:
        """The candidates since the step began."""
        found = tuple(candidate.fact(slot_of) for candidate in self.candidates)
        if found != self._found:  # one step is like another, and what is judged on equal facts need not be judged again
            self._found = found
        return self._found

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


def _is_last(module: nn.Module, handle: RemovableHandle) -> bool:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        if handle.id in hooks:
            return bool(next(reversed(hooks)) == handle.id)
    return True


def tensors_in(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    """Find the tensors in whatever a forward returns.

    Args:
        value: A tensor, a mapping, a sequence, a dataclass or an object with attributes.
        depth: How deep to look.

    Yields:
        The tensors.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif depth == 0 or value is None or isinstance(value, str | bytes | int | float | nn.Module):
        return
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from tensors_in(item, depth - 1)
