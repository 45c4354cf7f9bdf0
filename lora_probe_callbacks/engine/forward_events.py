"""What the forwards of a run do, as torch tells it: they begin, and end.

A forward that begins tells what became of the step before it: made, skipped, or still being accumulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_probe_callbacks.distributed.consensus import Agreement
from lora_probe_callbacks.engine.collector import Observers
from lora_probe_callbacks.engine.decision import Decisions
from lora_probe_callbacks.engine.errors import Errors
from lora_probe_callbacks.engine.estimator import Estimates
from lora_probe_callbacks.engine.rerun import Reruns
from lora_probe_callbacks.engine.run_state import RunState
from lora_probe_callbacks.engine.step_events import StepEvents
from lora_probe_callbacks.observe.forward.hooks import ForwardObserver

__all__ = ["ForwardEvents"]

_PASSES = 16  # backward passes without a single step after which a run is decided all the same


class ForwardEvents:
    """Follows the forwards of one run.

    Args:
        steps: Follows its steps.
        state: Where the run is.
        observers: What looks at tensors.
        hooks: Who watches the forwards.
        decisions: Decides.
        estimates: The estimators.
        reruns: What runs a forward again.
        agreement: The other ranks.
        errors: Errors of our own.
        scaler: A gradient scaler, if the loop has one.
        settle: Called at the first training forward: what is expected may have changed since the session began.
    """

    def __init__(
        self,
        *,
        steps: StepEvents,
        state: RunState,
        observers: Observers,
        hooks: ForwardObserver,
        decisions: Decisions,
        estimates: Estimates,
        reruns: Reruns,
        agreement: Agreement,
        errors: Errors,
        scaler: torch.amp.GradScaler | None,
        settle: Callable[[], None],
    ) -> None:
        self._steps = steps
        self._state = state
        self._observers = observers
        self._hooks = hooks
        self._decisions = decisions
        self._estimates = estimates
        self._reruns = reruns
        self._agreement = agreement
        self._errors = errors
        self._scaler = scaler
        self._scaler_round = None if scaler is None else scaler._per_optimizer_states
        self._settle = settle
        self._decided_start = False
        self._next_look = max(_PASSES, 2 * (state.accumulation or 0))  # at so many passes without a step

    def before_forward(self, module: nn.Module) -> None:
        """A candidate for a training forward is about to run.

        Args:
            module: The outermost module.
        """
        owners = self._observers.owners
        owners.inside_forward = True
        try:
            self._forward_begins(module)
        finally:
            owners.inside_forward = False

    def _forward_begins(self, module: nn.Module) -> None:
        state = self._state
        if not self._decided_start:
            self._decided_start = True
            if not state.broken:
                with self._errors.contain():
                    self._settle()
            self._steps.decide("start", None)
        self._look_back()
        self._decisions.raise_again()
        self._agreement.forward_begins()
        if state.broken:
            return
        self._estimates.forward_begins()
        self._reruns.forward_begins(module)

    def _look_back(self) -> None:
        """Was the step that went before this forward skipped? Or are there passes and passes, and never a step?"""
        owners = self._observers.owners
        received = sum(c.received for c in self._hooks.log.candidates)
        went_on = self._scaler_went_on()  # zeros in place of gradients do not tell
        waited = self._steps.waited_for
        late = self._state.backwards.waited
        self._steps.now.next_forward(received > 0, waited, owners.has_gradients, went_on=went_on, waited=late)
        if self._steps.now.done(waited) and (waited or received):  # the update never came
            if not self._steps.now.decided:
                self._steps.now.decided = True
                self._steps.decide("skipped", None)
            self._steps.end_step()
        elif self._waited_too_long(received) and not self._agreement.several:
            self._next_look *= 2
            self._steps.decide("waiting", None)

    def _waited_too_long(self, received: int) -> bool:
        backwards = self._state.backwards
        if any(self._state.steps_of[owner] for owner in self._observers.owners.owning()):
            return received > 0 and backwards.overdue and max(backwards.since) >= self._next_look
        return self._state.passes + received >= self._next_look

    def _scaler_went_on(self) -> bool:
        """The scaler was updated since the last training forward: what it had to step is stepped or skipped."""
        if self._scaler is None:
            return False
        # torch 2.13: update() begins a new table of what every optimizer has been through.
        before, self._scaler_round = self._scaler_round, self._scaler._per_optimizer_states
        return before is not self._scaler_round

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Directly after a candidate, before its backward: run it again where that is due.

        Args:
            module: The outermost module.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned.

        Returns:
            The output to hand on.
        """
        if not self._state.broken:
            self._estimates.forward_ends(args, kwargs)
        return self._reruns.after_forward(module, args, kwargs, output)
