"""The examples of one probed run: when they are watched, and whom their scores are told."""

from __future__ import annotations

import functools
import traceback
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_probe_callbacks.engine.telling import Teller
from lora_probe_callbacks.estimators._owners import parameters, unwrapped
from lora_probe_callbacks.estimators.examples import ExampleProbe
from lora_probe_callbacks.estimators.in_step import InStep
from lora_probe_callbacks.observe.forward.hooks import ForwardObserver
from lora_probe_callbacks.observe.model.targets import Targets

__all__ = ["Examples"]


class Examples:
    """Watches the examples of steps while they run.

    Args:
        probe: What to compute; None if nothing.
        targets: What is expected to train.
        hooks: Who watches the forwards; sees nothing of what is run here.
        teller: Is told metrics, lists and reasons.
        scaler: A gradient scaler, if the loop has one.
    """

    def __init__(
        self,
        probe: ExampleProbe | None,
        targets: Targets,
        hooks: ForwardObserver,
        teller: Teller,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._probe = probe
        self._targets = targets
        self._hooks = hooks
        self._teller = teller
        self._scaler = scaler
        self._watched: InStep | None = None
        self._waiting: list[RemovableHandle] = []  # for the first forward of the step
        self._before: dict[str, torch.Tensor] = {}
        self.broken: str | None = None  # why examples cannot be scored

    def begin_step(self, step: int) -> None:
        """A new step: wait for its first training forward, where it is due."""
        self._let_go()
        if self._probe is None or self.broken is not None or not self._probe.due(step):
            return
        before, self._before = self._before, {}
        try:
            with self._hooks.aside():  # a direction may run the model
                self._watched = self._probe.prepared(self._model, self._targets.optimizers, before)
        except Exception as error:
            self._give_up(error)
        if self._watched is not None:
            for frame in self._watched.frames:
                hook = functools.partial(self._forward_begins, self._watched)
                self._waiting.append(frame.register_forward_pre_hook(hook, with_kwargs=True))

    def _forward_begins(self, watched: InStep, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1 or not self._waiting:
            return
        self._wait_no_more()
        try:
            watched.start()
            watched.joins(module, args, kwargs)
        except Exception as error:
            self._give_up(error)

    def stepping(self, step: int, framework_step: int, *, inside: bool) -> None:
        """The update is about to come; a closure has not made its gradients yet, which come ``inside`` the step."""
        if self._probe is None or self.broken is not None:
            return
        if not inside and self._watched is not None and self._watched.seen:
            watched, self._watched = self._watched, None
            self._tell(watched, step, framework_step)
        if self._probe.wants_last_step and self._probe.due(step + 1) and not self._before:
            named = parameters(unwrapped(self._model)).items()
            self._before = {name: p.detach().clone() for name, p in named if p.requires_grad}

    def forget(self) -> None:
        """Let go of all tensors and hooks."""
        self._let_go()
        self._before = {}

    def _tell(self, watched: InStep, step: int, framework_step: int) -> None:
        assert self._probe is not None
        watched.stop()
        try:
            with self._hooks.aside():
                scores = watched.finish()
            self._probe.latest = scores
            scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
            row = self._probe.metrics(scores)
            listing = self._probe.listing(scores, watched, scale)
        except Exception as error:
            self._give_up(error)
            return
        if scores.why_unchecked is not None:
            self._teller.once(f"examples: their scores could not be checked: {scores.why_unchecked}")
        self._teller.row(row, framework_step)
        if listing:
            self._teller.examples({"step": step, "framework_step": framework_step, **listing})

    def _give_up(self, error: Exception) -> None:
        """What cannot be scored once will not be later: say so, once."""
        self.broken = f"could not judge: {type(error).__name__}: {error}"
        traceback.clear_frames(error.__traceback__)
        self._teller.once(f"examples: {self.broken}")
        self.forget()

    def _let_go(self) -> None:
        self._wait_no_more()
        if self._watched is not None:
            self._watched.stop()
            self._watched = None

    def _wait_no_more(self) -> None:
        while self._waiting:
            self._waiting.pop().remove()

    @property
    def _model(self) -> nn.Module:
        """The module that holds the adapter, as the front door was given it."""
        mine = {id(t) for slot in self._targets.slots if (t := slot.tensor) is not None}
        roots = [root for _, root in self._targets.roots]
        return next((r for r in roots if any(id(p) in mine for p in r.parameters())), roots[0])
