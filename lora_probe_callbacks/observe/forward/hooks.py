"""Watch the forwards of one step through torch's own hooks.

A **candidate** is a call of an outermost module with gradients enabled, outside any backward.
It becomes a training forward when its output receives a gradient. Layers inside inherit that
classification: in a reentrant checkpoint they run under no_grad, and every checkpoint runs them
again inside the backward.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from lora_probe_callbacks.observe.device.token_rows import TokenRows
from lora_probe_callbacks.observe.forward.candidate import Candidate
from lora_probe_callbacks.observe.forward.graph import (
    capturing,
    in_backward,
)
from lora_probe_callbacks.observe.forward.log import ForwardLog
from lora_probe_callbacks.observe.forward.supervision import SupervisionObserver
from lora_probe_callbacks.observe.model.inventory import Inventory, Unit
from lora_probe_callbacks.observe.model.wrappers import hooks_fire

__all__ = ["ForwardObserver"]


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
            self._observer.log.traced = True
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
        self.log = ForwardLog(self.hook, on_error)
        self.paused = False  # while the probe itself runs the model
        self.token_rows: list[TokenRows] = []  # of new tokens, in the embeddings that read them
        self.supervision: SupervisionObserver | None = None
        self._before = before
        self._after = after
        self._on_error = on_error
        self._handles: list[tuple[nn.Module, RemovableHandle]] = []
        self._outermosts: set[int] = set()  # ids of the modules that tell when they are left
        self._complete = False  # all hooks of a step are in place
        self._thread = threading.local()

    def watch(self, inventory: Inventory, units: list[Unit]) -> None:
        """Say what to observe. May be called in the middle of a step, hooks move with it.

        Args:
            inventory: The adapted layers and the modules above them.
            units: The units that are expected to train.
        """
        armed = self.armed
        self.disarm()
        self.log.watch(inventory, units)
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
        self._thread = threading.local()
        self.close_witness()
        self.log.begin()
        self.log.witness = None

    def arm(self) -> None:
        """Install the hooks of one step; those of the step before it may stay."""
        for rows in self.token_rows:
            rows.begin()
        if self.supervision is not None:
            self.supervision.begin()
        if self._complete and not self.log.traced:
            self._let_outputs_go()
            return
        self.disarm()
        if self.log.traced:
            return
        self._complete = True
        hooked: set[int] = set()
        for name, module, inside in self.log.inventory.ancestors:
            if inside or not hooks_fire(module):
                continue
            hooked.add(id(module))
            self._hook(module, name)
        for layer in self.log.inventory.layers:
            if layer.compiled:
                continue
            if id(layer.called) not in hooked:
                hooked.add(id(layer.called))
                self._hook(layer.called, layer.name)
        self._hook_parts()

    def watch_parts(self, rows: list[TokenRows], supervision: SupervisionObserver | None) -> None:
        """Watch embeddings, the body and the head as well, from the forward on that is about to run.

        Args:
            rows: Of new tokens, in the embeddings that read them.
            supervision: Of the language model, if it is one.
        """
        self.token_rows, self.supervision = rows, supervision
        if self.armed:
            self._hook_parts()

    def _hook_parts(self) -> None:
        compiled = {id(module) for _, module, inside in self.log.inventory.ancestors if inside}
        parts = [] if self.supervision is None else self.supervision.modules
        for module in () if any(id(part) in compiled or not hooks_fire(part) for part in parts) else parts:
            handle = module.register_forward_hook(_Hook(self, self._ran, None), with_kwargs=True)
            self._handles.append((module, handle))
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
        for handle in self.log.output_handles:
            handle.remove()
        self.log.output_handles.clear()

    def close_witness(self) -> None:
        """End the watch over operations, on the thread that began it."""
        if self.log.witness is not None:
            self.log.witness.close()

    # --- hooks ------------------------------------------------------------------------------

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.paused or in_backward():
            return
        frame: _Frame | None = getattr(self._thread, "frame", None)
        # The module of the frame again: it calls itself, or that forward ended in a BaseException, which calls no hook.
        if frame is not None and frame.module is not module:
            if frame.candidate is None:
                self.log.note_beside(module)
            else:
                try:
                    self.log.note_call(frame.candidate, module)
                except Exception as error:
                    self._on_error(error)
            return
        self._outermost(name, module, (args, kwargs))

    def _outermost(self, name: str, module: nn.Module, inputs: object) -> None:
        outer_error = sys.exc_info()[1]
        candidate = None
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            self.log.outside_training(module)
        elif not capturing():
            try:
                self._before(module)
            except BaseException:
                self.disarm()
                raise
            if not self.armed:
                return
            try:
                candidate = self.log.new_candidate(name, module, inputs)
            except Exception as error:
                self._on_error(error)
            if self.log.witness is not None:
                self.log.witness.paused = False
                self.log.witness.open()
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
                self.log.finish(candidate, output)
                if self.supervision is not None:
                    self.supervision.left(kwargs)
                if self._after is not None:
                    return self._after(module, args, kwargs, output)
            except Exception as failure:
                self._on_error(failure)
        return None

    def _ran(self, _: None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        frame: _Frame | None = getattr(self._thread, "frame", None)
        seen = self.supervision
        if seen is None or self.paused or in_backward() or frame is None or frame.candidate is None:
            return
        try:
            self.log.output_handles += seen.ran(module, args, kwargs, output)
        except Exception as error:
            self._on_error(error)

    def _embedded(self, rows: TokenRows, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame: _Frame | None = getattr(self._thread, "frame", None)
        if self.paused or in_backward() or frame is None or frame.candidate is None or not args:
            return
        if isinstance(output, torch.Tensor) and output.requires_grad and isinstance(args[0], torch.Tensor):
            hook = _Hook(self, self._came_to, (rows, args[0]))
            self.log.output_handles.append(output.register_hook(hook))  # type: ignore[no-untyped-call]

    def _came_to(self, where: tuple[TokenRows, torch.Tensor], gradient: torch.Tensor | None) -> None:
        rows, ids = where
        try:
            if gradient is not None:
                rows.came(ids, gradient)
        except Exception as error:
            self._on_error(error)


def _is_last(module: nn.Module, handle: RemovableHandle) -> bool:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        if handle.id in hooks:
            return bool(next(reversed(hooks)) == handle.id)
    return True
