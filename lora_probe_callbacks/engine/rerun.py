"""The few looks that run a training forward again: is it stale, and is its gradient that of the loss?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from lora_probe_callbacks.checks._base import Need
from lora_probe_callbacks.checks.reachability.wrong_gradient import hopeless, unsettled
from lora_probe_callbacks.engine.cadence import Cadence
from lora_probe_callbacks.engine.collector import Collector, Observers
from lora_probe_callbacks.engine.run_state import RunState
from lora_probe_callbacks.engine.telling import Teller
from lora_probe_callbacks.engine.touches import Touches
from lora_probe_callbacks.facts import StepResponse
from lora_probe_callbacks.observe.forward.finite_difference import Plan, measure
from lora_probe_callbacks.observe.forward.followed_backward import BackwardObserver
from lora_probe_callbacks.observe.forward.hooks import ForwardObserver
from lora_probe_callbacks.observe.forward.loss_outside import LossTape, may_record
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
        self._backward: BackwardObserver | None = None
        self._began_with: RandomState | None = None

    def prepare(self, cadence: Cadence) -> None:
        """Look in this step, if it is due: repeat the forward, measure a part of the gradient."""
        step, touches = self._state.step, self.touches
        touch = cadence.touches(step, begun=touches.number, complete=touches.complete, doubt=touches.in_doubt)
        # Before the first update no forward can be stale.
        if "replay" in self._needs and step > 0 and cadence.repeats(step):
            self._looks.replay = ForwardRepeat(self._targets.device)
        if "finite difference" in self._needs and touch and not hopeless(self._looks.responses):
            tensors = [slot.tensor for slot in self._targets.slots]
            if all(t is not None for t in tensors):
                # From the second on: what the loop compiles would have been seen by then.
                tape = LossTape() if self.touches.asks_loss and may_record() else None
                self._backward = BackwardObserver([t for t in tensors if t is not None], self._hooks.hook, tape)

    @property
    def touches(self) -> Touches:
        """What was measured of each tensor of the present adapter."""
        slots = self._targets.slots
        if len(self._looks.touches) != len(slots):
            expected = [not self._targets.is_frozen(slot) for slot in slots]
            self._looks.touches = Touches([slot.role for slot in slots], np.array(expected, np.bool_))
        return self._looks.touches

    def forget(self) -> None:
        """Let go of all tensors and hooks of this step."""
        if self._backward is not None:
            self._backward.forget()
        self._looks.replay = self._backward = self._began_with = None

    def forward_begins(self, module: nn.Module) -> None:
        """Keep the random streams with which a training forward begins."""
        if self._looks.replay is not None or self._backward is not None:
            self._began_with = random_state(module)
        if self._backward is not None:
            self._backward.forward_begins(module)

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
        return output if self._backward is None else self._backward.after(kept, output)

    def stepping(self, *, inside: bool) -> None:
        """The update is about to come; a closure makes its gradients ``inside`` the step."""
        if self._backward is not None:
            self._backward.stepping(inside=inside)

    def measure(self) -> None:
        """Directly after the update: is the gradient that of the loss?"""
        backward = self._backward
        if backward is None:
            return
        scales = [s for o in self._targets.optimizers if (s := grad_scale(o)) is not None]
        scale = float(scales[0]) if scales else 1.0 if self._scaler is None else float(self._scaler.get_scale())
        touches, doubts = self.touches, []

        def in_doubt(found: StepResponse) -> bool:
            more = touches.may_doubt and unsettled(found)
            doubts.extend([found] * more)
            return more

        plan = Plan(touches.choose, in_doubt, touches.bends, response=not touches.number, scale=scale)
        with self._hooks.aside():
            found = measure(backward, plan, self._state.step, self._state.framework_step())
        touches.enter(found, cost_more=bool(doubts))
        self._looks.responses = touches.responses
        self._teller.row(metrics_of_response(found), found.framework_step)
