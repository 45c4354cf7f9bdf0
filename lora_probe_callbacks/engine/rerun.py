"""The few looks that run a training forward again: is it stale, and is its gradient that of the loss?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_probe_callbacks.checks._base import Need
from lora_probe_callbacks.checks.reachability.wrong_gradient import hopeless, unsettled
from lora_probe_callbacks.engine.cadence import ALWAYS
from lora_probe_callbacks.engine.collector import Collector, Observers
from lora_probe_callbacks.engine.run_state import RunState
from lora_probe_callbacks.engine.telling import Teller
from lora_probe_callbacks.observe.forward.finite_difference import ResponseObserver
from lora_probe_callbacks.observe.forward.hooks import ForwardObserver
from lora_probe_callbacks.observe.forward.replay import ForwardRepeat, KeptForward
from lora_probe_callbacks.observe.model.ownership import grad_scale
from lora_probe_callbacks.report.metrics import metrics_of_response
from lora_probe_callbacks.restore.module_state import random_state
from lora_probe_callbacks.restore.random import RandomState

__all__ = ["Reruns"]


class Reruns:
    """Runs forwards of one step again, in the steps in which that is due.

    Args:
        needs: What the selected checks cannot do without.
        state: Where the run is.
        observers: What looks at tensors.
        hooks: Who watches the forwards; sees nothing of what is run here.
        collector: Is given what was found.
        teller: Is told the metrics.
        scaler: A gradient scaler, if the loop has one.
    """

    def __init__(
        self,
        needs: frozenset[Need],
        state: RunState,
        observers: Observers,
        hooks: ForwardObserver,
        collector: Collector,
        teller: Teller,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._needs = needs
        self._state = state
        self._targets = observers.targets
        self._hooks = hooks
        self._looks = collector.looks
        self._teller = teller
        self._scaler = scaler
        self._response: ResponseObserver | None = None
        self._began_with: RandomState | None = None

    def prepare(self, *, first: bool) -> None:
        """Look in this step.

        Args:
            first: Nothing was updated so far, so that no forward can be stale.
        """
        if "replay" in self._needs and not first:
            self._looks.replay = ForwardRepeat(self._targets.device)
        if "finite difference" in self._needs and not hopeless(self._looks.responses):
            tensors = [t for slot in self._targets.slots if (t := slot.tensor) is not None]
            self._response = ResponseObserver(tensors, self._hooks.hook)

    def forget(self) -> None:
        """Let go of all tensors and hooks of this step."""
        if self._response is not None:
            self._response.forget()
        self._looks.replay = self._response = self._began_with = None

    def forward_begins(self, module: nn.Module) -> None:
        """Keep the random streams with which a training forward begins."""
        if self._looks.replay is not None or self._response is not None:
            self._began_with = random_state(module)

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Directly after a candidate, before its backward.

        Args:
            module: The outermost module.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned.

        Returns:
            The output to hand on.
        """
        if self._began_with is None:
            return output
        kept = KeptForward(module, args, kwargs, self._began_with, self._targets.device)
        if self._looks.replay is not None:
            with self._hooks.aside():
                self._looks.replay.after(kept, output)
        return output if self._response is None else self._response.after(kept, output)

    def stepping(self, *, inside: bool) -> None:
        """The update is about to come; a closure makes its gradients ``inside`` the step."""
        if self._response is not None:
            self._response.stepping(inside=inside)

    def measure(self) -> None:
        """Directly after the update: what did it do to the loss?"""
        response = self._response
        if response is None:
            return
        scales = [s for o in self._targets.optimizers if (s := grad_scale(o)) is not None]
        scale = float(scales[0]) if scales else 1.0 if self._scaler is None else float(self._scaler.get_scale())
        with self._hooks.aside():
            found = response.measure(self._state.step, self._state.framework_step(), scale, unsettled)
        self._looks.responses = (*self._looks.responses, found)[-ALWAYS:]
        self._teller.row(metrics_of_response(found), found.framework_step)
