"""What the optimizers of a run do, as torch tells it: they are about to step, and have stepped.

A step lasts from the end of the last one until every optimizer that owns intended tensors has stepped, or its gradients
were thrown away. At its first optimizer event the one decision of the step is made. Nothing is judged here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lora_probe_callbacks._gc import no_collection
from lora_probe_callbacks.distributed.consensus import Agreement
from lora_probe_callbacks.engine.cadence import Cadence
from lora_probe_callbacks.engine.collector import Collector, Observers
from lora_probe_callbacks.engine.decision import Decisions
from lora_probe_callbacks.engine.errors import Errors
from lora_probe_callbacks.engine.estimator import Estimates
from lora_probe_callbacks.engine.rerun import Reruns
from lora_probe_callbacks.engine.run_state import RunState
from lora_probe_callbacks.engine.step_tracker import StepTracker
from lora_probe_callbacks.facts import Moment
from lora_probe_callbacks.observe.forward.graph import capturing
from lora_probe_callbacks.observe.forward.hooks import ForwardObserver
from lora_probe_callbacks.observe.forward.weight_usage import WeightWitness
from lora_probe_callbacks.observe.model.ownership import found_inf, unwrap_optimizer

__all__ = ["StepEvents"]


class StepEvents:
    """Follows the steps of one run.

    Args:
        state: Where the run is.
        cadence: Which steps are probed.
        observers: What looks at tensors.
        hooks: Who watches the forwards.
        collector: Makes the facts.
        decisions: Decides.
        estimates: The estimators.
        reruns: What runs a forward again.
        agreement: The other ranks.
        errors: Errors of our own.
    """

    def __init__(
        self,
        *,
        state: RunState,
        cadence: Cadence,
        observers: Observers,
        hooks: ForwardObserver,
        collector: Collector,
        decisions: Decisions,
        estimates: Estimates,
        reruns: Reruns,
        agreement: Agreement,
        errors: Errors,
    ) -> None:
        self._state = state
        self._cadence = cadence
        self._observers = observers
        self._hooks = hooks
        self._collector = collector
        self._decisions = decisions
        self._estimates = estimates
        self._reruns = reruns
        self._agreement = agreement
        self._errors = errors
        self._last_probed = False
        self._handles: list[RemovableHandle] = []
        self.now = StepTracker()

    def install(self) -> None:
        """Hang hooks on the optimizers."""
        for index, optimizer in enumerate(self._observers.targets.optimizers):
            self._handles.append(optimizer.register_step_pre_hook(self._before_step(index)))
            self._handles.append(optimizer.register_step_post_hook(self._after_step(index)))
        state, number = self._state, len(self._observers.targets.optimizers)
        state.steps_of, seen = [0] * number, lambda: not self._hooks.paused
        state.backwards.begin(number, state.accumulation or 1, counts=seen, overdue=self._look_again)
        self._hang()

    def _hang(self) -> None:
        """Count backward passes at tensors that are known to get gradients."""
        history = self._state.history
        learning = history.had_gradient & (history.missing == 0)
        self._state.backwards.hang(self._observers.owners.one_of_each(learning))

    def _look_again(self) -> None:
        """The loop goes on without a step: look at what it does, although no probed step has begun."""
        state = self._state
        if state.running and not state.broken and self._cadence.newly_probed(state.step):
            with self._errors.contain():
                self._hooks.reset()
                self._prepare()
                self._hooks.arm()

    def remove(self) -> None:
        """Take them away again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --- steps ------------------------------------------------------------------------------

    @property
    def _probed(self) -> bool:
        return self._cadence.probed(self._state.step)

    def begin_step(self) -> None:
        """A new step: arm what is due in it."""
        state = self._state
        self.now = StepTracker()
        self._reruns.forget()
        self._hooks.reset()
        self._estimates.examples.begin_step(state.step)
        if not self._probed or (state.broken and not self._agreement.several):
            self._hooks.disarm()
            return
        if not state.broken:
            self._prepare()
        self._hooks.arm()

    def _prepare(self) -> None:
        layers, state = self._observers.layers, self._state
        self._hooks.log.closely = self._cadence.closely(state.step) or layers.packed()[0] > 0
        suspected = layers.suspected_weights()
        if suspected and not self._observers.targets.inventory.compiled:
            self._hooks.log.witness = WeightWitness(suspected)
        self._reruns.prepare(self._cadence)

    def end_step(self) -> None:
        """The step is over: count it, and begin the next one."""
        state, hooks = self._state, self._hooks
        self._reruns.forget()
        if not self.now.stepped & self._observers.owners.owning():
            state.skipped_in_a_row += 1
            state.cleared += bool(self.now.discarded - state.given_up)
            state.passes += sum(c.received for c in hooks.log.candidates)
        elif not self.now.left_to_it:  # else the next decision reads what it did
            state.has_stepped()
        state.was_active |= hooks.log.active_seen
        state.merges += hooks.log.merged_seen
        self._last_probed = self._probed or self._estimates.due(state.step)
        if self._probed and not state.broken:
            self._hang()
        stepped = self.now.stepped
        state.step += 1
        if self._observers.owners.thawed():
            self._cadence.begin_again(state.step)
        self.begin_step()
        if self._probed and not state.broken:
            owners = self._observers.owners
            hooks.log.arrivals.step_ended({slot for index in stepped for slot in owners.of_optimizer(index)})

    @property
    def waited_for(self) -> set[int]:
        """The optimizers whose step ends this one."""
        return self._observers.owners.owning() - self._state.given_up

    def _end_step_if_done(self) -> None:
        if self.now.done(self.waited_for):
            self.end_step()

    def _begins_again(self, index: int) -> None:
        self._state.given_up |= self.now.begins_again(index, self.waited_for, self._observers.owners.has_gradients)
        self._end_step_if_done()

    # --- optimizers -------------------------------------------------------------------------

    def gradients_ready(self, optimizer: object) -> None:
        """The gradients of this step are complete, and an optimizer, or one behind a wrapper, is about to step."""
        inner = unwrap_optimizer(optimizer)
        for index, known in enumerate(self._observers.targets.optimizers):
            if known is inner:
                self._optimizer_event(index, final=False)

    def _before_step(self, index: int) -> Callable[..., None]:
        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._state.running or capturing():
                return
            closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
            reader = self._observers.reader
            if closure is None:
                self._optimizer_event(index, final=True)
                if self._probed and not self._state.broken:
                    with self._errors.contain():
                        reader.read_scaled(index)
            else:  # the gradients of this step are made inside: only the tensors can be looked at
                if index in self.now.stepped:
                    self._begins_again(index)
                if self._probed:
                    with self._errors.contain():
                        self._observers.owners.look()
                        reader.copy(index, self._state.step)
                self._before_update(inside=True)
            self.now.inside.add(index)

        return hook

    def _after_step(self, index: int) -> Callable[..., None]:
        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = self._state
            if not state.running or capturing():
                return
            if index not in self.now.ready:  # a closure: only now the gradients of this step can be seen
                self._optimizer_event(index, final=False)
            if self._collector.checkpoints is not None:
                self._collector.checkpoints.stepped_at = time.time()
            self.now.has_stepped(index, left_to_it=found_inf(optimizer) is not None)
            state.steps_of[index] += 1
            state.backwards.has_stepped(index)
            if self._observers.owners.has_stepped(index, self.now.stepped):
                self._hang()
            state.given_up.discard(index)
            self._read_after(index)
            if self.now.done(self.waited_for):
                self._measure()
                self.end_step()

        return hook

    def _read_after(self, index: int) -> None:
        state, copies = self._state, self._observers.owners.copies
        if state.broken:
            return
        with self._errors.contain():
            if copies is not None:
                copies.stepped(state.step, state.framework_step())
            reader = self._observers.reader
            reader.stepped(index)
            if self._probed:
                with no_collection():
                    reader.read_after(index, state.step, state.framework_step())
            elif self._cadence.precedes(state.step):
                reader.read_position(index, state.step, after=True)

    def _measure(self) -> None:
        """Directly after the last update of a step, never inside a closure or a forward."""
        if not self._state.broken:
            with self._errors.contain():
                self._reruns.measure()
            with self._errors.contain():
                self._estimates.run()

    def _optimizer_event(self, index: int, *, final: bool) -> None:
        self._hooks.close_witness()
        if index in self.now.stepped:
            self._begins_again(index)
        elif not final and self.now.announced_twice(index):
            self.now.discarded.add(index)
            self._end_step_if_done()
        if self._trails(index):
            return
        first = index not in self.now.ready
        self.now.ready.add(index)
        self._decisions.raise_again()
        state, reader = self._state, self._observers.reader
        if not self.now.decided:
            self.now.decided = True
            self._decide_step(index, final=final)
        elif first and self._probed:  # a further optimizer of a step that is decided already
            with self._errors.contain():
                self._observers.owners.look()
                reader.read_gradients(index, unowned=False)
        self._before_update()
        if self._probed and not state.broken:
            with self._errors.contain():
                reader.copy(index, state.step)
                reader.read_others_before()

    def _trails(self, index: int) -> bool:
        """It owns no adapter tensor and steps after the one that does, before anything of the next step has run."""
        of_others = index not in self._observers.owners.owning() and bool(self.waited_for)
        return of_others and self._probed and not self.now.decided and not self._hooks.log.candidates

    def _decide_step(self, index: int, *, final: bool) -> None:
        checkpoints, together = self._collector.checkpoints, self._agreement.several
        # Whether something waits may differ between ranks, of which one may have skipped its last step.
        waiting = self._last_probed if together else self._waits
        if self._probed or waiting:
            self.decide("step", index, final=final)
        elif checkpoints is not None and not self._state.broken and not together:
            with self._errors.contain("files"):
                found = checkpoints.take()
            if self._collector.checkpoints is not None:
                self._decisions.decide_on_files(found)

    def decide(self, moment: Moment, optimizer: int | None, *, final: bool = False) -> None:
        """Decide on the present step."""
        probed = self._probed
        self._decisions.decide(moment, optimizer, self._collector.step_of(moment), probed=probed, final=final)
        self._cadence.probed_steps += probed and moment in ("step", "skipped")

    def _before_update(self, *, inside: bool = False) -> None:
        """What the estimator and the step response start from; a closure makes its gradients ``inside`` the step."""
        state = self._state
        if not state.broken:
            with self._errors.contain():
                self._estimates.stepping()
                self._estimates.examples.stepping(state.step, state.framework_step(), inside=inside)
                self._reruns.stepping(inside=inside)

    @property
    def _waits(self) -> bool:
        """Something was observed that no decision has judged yet."""
        checkpoints = self._collector.checkpoints
        restored = checkpoints is not None and checkpoints.to_compare
        return self._observers.reader.waiting or bool(self._collector.looks.estimates) or restored

    # --- a step that is taken back ----------------------------------------------------------

    def rehearse(self, stepped: Callable[[Optimizer], bool]) -> None:
        """Judge one step of every optimizer; see :meth:`ProbeSession.rehearse`.

        Args:
            stepped: Lets an optimizer step, with its hooks held back; whether it did.
        """
        for index, optimizer in enumerate(self._observers.targets.optimizers):
            self._optimizer_event(index, final=True)
            if stepped(optimizer):
                self.now.has_stepped(index)
                self._state.steps_of[index] += 1
                self._state.backwards.has_stepped(index)
                self._read_after(index)
        self._measure()
        self.end_step()
