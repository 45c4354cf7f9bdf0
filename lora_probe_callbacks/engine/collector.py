"""The facts of one decision: asks every observer for its part and puts them together.

The order is that of one transfer: what travels from the device is gathered and sent, what needs no values is looked at
while the device is still busy, then the values are received. There is no judgement here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from lora_probe_callbacks.checks._base import Need
from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.distributed.consensus import Agreement
from lora_probe_callbacks.engine.errors import Errors
from lora_probe_callbacks.engine.run_state import RunState
from lora_probe_callbacks.engine.saves import Checkpoints
from lora_probe_callbacks.engine.touches import Touches
from lora_probe_callbacks.facts import (
    EstimatorFact,
    EstimatorFacts,
    Facts,
    FileFacts,
    ForwardFact,
    ForwardFacts,
    History,
    Mode,
    ModelFacts,
    Moment,
    Path,
    ReferenceFact,
    RolloutFact,
    RunFacts,
    ServingFacts,
    StartFact,
    StepResponse,
    UnitFact,
    When,
)
from lora_probe_callbacks.facts.model import Coverage
from lora_probe_callbacks.observe.device.frozen_state import FrozenState
from lora_probe_callbacks.observe.device.step_reader import DeviceReader, Readings
from lora_probe_callbacks.observe.forward.hooks import ForwardObserver
from lora_probe_callbacks.observe.forward.replay import ForwardRepeat
from lora_probe_callbacks.observe.forward.supervision import SupervisionObserver, language_model, stop_tokens
from lora_probe_callbacks.observe.model.layers import Layers, Part
from lora_probe_callbacks.observe.model.others import OtherAdapters
from lora_probe_callbacks.observe.model.owners import Owners
from lora_probe_callbacks.observe.model.ownership import grad_scale
from lora_probe_callbacks.observe.model.snapshot import model_facts
from lora_probe_callbacks.observe.model.targets import Targets
from lora_probe_callbacks.observe.model.unused import AdaptersElsewhere

__all__ = ["Collector", "Observers"]

_STEPS = 8  # whose accumulation is remembered


class Observers:
    """Everything that looks at one run.

    Args:
        targets: What is expected to train.
    """

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
        self.owners = Owners(targets)
        self.layers = Layers(targets)
        self.others = OtherAdapters(targets)
        self.reader = DeviceReader(targets, self.owners, self.others)

    def settle(self) -> None:
        """Begin anew with what is expected now."""
        self.owners.settle()
        self.layers.settle()
        self.others.settle()


@dataclass(slots=True)
class StepLooks:
    """What is looked at in the present step beside hooks, and what waits to be judged.

    Attributes:
        replay: Repeats a forward, to see whether it uses the present weights.
        touches: What was measured of the gradient of each tensor.
        responses: The last of these measurements.
        estimates: Estimators looked at since the last decision.
        rollouts: Rollouts, likewise.
    """

    replay: ForwardRepeat | None = None
    touches: Touches = dataclasses.field(default_factory=lambda: Touches((), np.zeros(0, np.bool_)))
    responses: tuple[StepResponse, ...] = ()
    estimates: list[EstimatorFact] = dataclasses.field(default_factory=list)
    rollouts: list[RolloutFact] = dataclasses.field(default_factory=list)


class Collector:
    """Makes the facts of a decision.

    Args:
        config: What was meant.
        needs: What the selected checks cannot do without.
        state: Where the run is.
        observers: What looks at it.
        hooks: Who watches the forwards.
        agreement: The other ranks.
        errors: Errors of our own.
        scaler: A gradient scaler, if the loop has one.
    """

    def __init__(
        self,
        config: ProbeConfig,
        needs: frozenset[Need],
        state: RunState,
        observers: Observers,
        hooks: ForwardObserver,
        agreement: Agreement,
        errors: Errors,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._config = config
        self._needs = needs
        self._state = state
        self._observers = observers
        self._hooks = hooks
        self._agreement = agreement
        self._errors = errors
        self._scaler = scaler
        self._looked_at_start = False
        self._start: StartFact | None = None
        self._coverage: Coverage | None = None
        self._reference = None if config.reference is None else ReferenceFact(disabled=False, active=0)
        self._elsewhere = AdaptersElsewhere()
        self.looks = StepLooks()
        self.checkpoints: Checkpoints | None = None

    @property
    def frozen_state(self) -> FrozenState:
        """What training moves beside the adapter."""
        return self._observers.reader.frozen_state

    # --- what is watched --------------------------------------------------------------------

    def watch(self) -> None:
        """Observe the units that are expected now, from a clean slate."""
        observers = self._observers
        size = len(observers.targets.slots)
        self._state.history, self._state.path = History.empty(size), Path.empty(size)
        self._hooks.log.tensors = observers.owners.tensors
        self._hooks.log.sharded = bool(observers.owners.shards())
        self._hooks.watch(observers.targets.inventory, observers.targets.units)

    def _refresh(self) -> None:
        """Look at the slots, and begin anew if a layer was exchanged."""
        observers, state = self._observers, self._state
        if not observers.targets.refresh():
            observers.owners.look()
            self._hooks.log.tensors = observers.owners.tensors
            return
        observers.settle()
        history, path = state.history, state.path
        self.watch()
        if len(history) == len(state.history):
            state.history, state.path = history, path
        else:
            observers.reader.forget_readings()

    def step_of(self, moment: Moment) -> int:
        """At the end, the step that would come next has not begun unless a forward was seen."""
        step = self._state.step
        over = moment == "end" and step and not self._hooks.log.candidates
        return step - 1 if over else step

    # --- collecting -------------------------------------------------------------------------

    def collect(self, moment: Moment, optimizer: int | None, step: int, *, probed: bool, final: bool) -> Facts:
        """All that is known now.

        Args:
            moment: What the decision is made for.
            optimizer: Whose event it is.
            step: The step being decided.
            probed: Gradients of this step are read.
            final: Nothing can change them between this reading and the update.

        Returns:
            The facts of this rank.
        """
        self._refresh()
        reader, owners, targets = self._observers.reader, self._observers.owners, self._observers.targets
        if moment == "waiting" and not self._state.ever_stepped:
            for owner in filter(owners.has_gradients, owners.owning()):  # else they were cleared since
                reader.read_gradients(owner, unowned=False)
        if probed and optimizer is not None:
            reader.read_gradients(optimizer, unowned=True)
            reader.copy(optimizer, step)
        elif optimizer is not None:
            reader.read_position(optimizer, step, after=False)
        if self._agreement.several:
            reader.read_samples(optimizer if probed else None)
        arrivals = self._hooks.log.arrivals
        reader.send(
            cotangents=self._hooks.log.cotangents(),
            counts=arrivals.counts() if probed else [],
            sample=probed or optimizer is not None,
            closely=probed and self._hooks.log.closely,
        )
        # An accelerator is still busy with the backward at this time: what needs no values is looked at meanwhile.
        if not self._looked_at_start:
            self._looked_at_start = True
            with self._errors.contain("initial look"):
                self._look_at_start()
        seen = self._hooks.log.facts(owners.seen())
        model = self._model_facts()
        called = self._hooks.log.called()
        parts = self._observers.layers.left_out(seen.forwards, called), self._observers.layers.factors()
        was_active = self._state.was_active | self._hooks.log.active_seen
        readings = reader.receive(
            When(moment, optimizer if probed else None, step), final=final, merges=self._state.merges, active=was_active
        )
        if probed and moment in ("step", "skipped", "waiting"):
            self._state.accumulated = (*self._state.accumulated, arrivals.fact(readings.counts))[-_STEPS:]
        self._advance(model, readings, step)
        facts = Facts.of(
            When(moment, optimizer, step, self._state.framework_step()),
            dataclasses.replace(
                model,
                units=self._units(parts, readings),
                factors_row=self._observers.layers.factors_row,
                factors_moved=self._observers.layers.factors_moved,
            ),
            self._forward_facts(seen, moment),
            readings.facts,
            readings.supervision,
            self._run_facts(readings, moment, seen.forwards),
            EstimatorFacts(tuple(self.looks.estimates)),
            ServingFacts(rollouts=tuple(self.looks.rollouts)),
            self._agreement.facts(targets, owners, called, readings),
        )
        self.looks.estimates.clear()
        self.looks.rollouts.clear()
        return self._with_files(self._with_elsewhere(facts))

    def _look_at_start(self) -> None:
        """Values and names, once; models differ most here, and what cannot be read ends these checks alone."""
        layers, reader = self._observers.layers, self._observers.reader
        self._start = layers.start(self._state.framework_step())
        self._coverage = layers.coverage()
        self._observers.others.look_at_start()
        reader.token_rows = layers.token_rows()
        if "supervision" in self._needs:
            reader.supervision = self._supervision()
        self._hooks.watch_parts(reader.token_rows, reader.supervision)

    def _supervision(self) -> SupervisionObserver | None:
        model = language_model([root for _, root in self._observers.targets.roots])
        if model is None:
            return None
        return SupervisionObserver(model, self._hooks.hook, self._errors.report, stop_tokens(self._state.tokenizer))

    def _model_facts(self) -> ModelFacts:
        targets, owners, layers = self._observers.targets, self._observers.owners, self._observers.layers
        start = self._start if self._start and len(self._start.units) == len(targets.units) else None
        facts = model_facts(targets, owners, layers, *self._hooks.log.state())
        thaw = self._state.thaw_announced
        return dataclasses.replace(facts, start=start, coverage=self._coverage, thaw_announced=thaw)

    def _advance(self, model: ModelFacts, readings: Readings, step: int) -> None:
        """What is counted from decision to decision."""
        state, read = self._state, readings.facts
        state.history = state.history.after(model.slots, read.gradients, read.update, step)
        state.path = state.path.along(read.looks, model.slots, read.update, read.base_moved, step)
        if readings.skipped_inside:
            state.skipped_in_a_row += 1
        elif readings.skipped_inside is not None:
            state.has_stepped()

    def _units(self, parts: tuple[list[Part] | None, list[float | None]], readings: Readings) -> tuple[UnitFact, ...]:
        used = {} if self._hooks.log.witness is None else self._hooks.log.witness.seen
        return self._observers.layers.facts(*parts, readings.facts.gradients, used)

    def _forward_facts(self, seen: ForwardFacts, moment: Moment) -> ForwardFacts:
        self._look_beside(seen.forwards, moment)
        replay = self.looks.replay
        return dataclasses.replace(
            seen,
            reference=self._reference,
            stale_forward=None if replay is None else replay.stale,
            why_not_repeated=None if replay is None else replay.why_not,
            responses=self.looks.responses,
            measured=self.looks.touches.measured,
        )

    def _look_beside(self, forwards: tuple[ForwardFact, ...], moment: Moment) -> None:
        """Did a forward run with the adapters disabled, where the loss compares with it?"""
        if self._reference is None:
            return
        modes = {*self._hooks.log.beside, *(m for f in forwards for m in _ran_in(f))}
        # With gradients and never differentiated: a reference that is detached afterwards.
        if any(f.received for f in forwards):
            units = range(len(self._observers.targets.units))
            aside = [f for f in forwards if not f.received]
            modes |= {f.mode(u) for f in aside for u in units if f.called(u) is not False}
        active = "active" in modes and moment in ("step", "skipped")
        self._reference = ReferenceFact(
            disabled=self._reference.disabled or "disabled" in modes, active=self._reference.active + active
        )

    def _run_facts(self, readings: Readings, moment: Moment, forwards: tuple[ForwardFact, ...]) -> RunFacts:
        optimizers = self._observers.targets.optimizers
        scaler = self._scaler is not None or any(grad_scale(o) is not None for o in optimizers)
        overflow = scaler and bool(readings.facts.gradients.broken.any())
        skipped = self._state.skipped_in_a_row + (moment == "skipped" or overflow)
        return self._state.facts(
            skipped=skipped,
            passes=self._state.passes + sum(f.received for f in forwards),
            scaler=scaler,
            # Reading the scale costs a transfer: only when steps are being skipped.
            loss_scale=float(self._scaler.get_scale()) if self._scaler is not None and skipped else None,
        )

    def _with_elsewhere(self, facts: Facts) -> Facts:
        owners, optimizers = self._observers.owners, self._observers.targets.optimizers
        if not facts.nobody_called or any(map(owners.has_gradients, range(len(optimizers)))):
            return facts  # else something beside the adapter is trained first
        layers = self._observers.targets.inventory.layers
        return dataclasses.replace(facts, elsewhere=self._elsewhere.look([layer.module for layer in layers]))

    def _with_files(self, facts: Facts) -> Facts:
        """What was saved and restored since the last decision."""
        checkpoints = self.checkpoints
        if checkpoints is None:
            return facts
        moved = facts.history.had_move & facts.slots.of_role("B")
        checkpoints.moved = checkpoints.moved or bool(moved.any())
        found = FileFacts()
        with self._errors.contain("files"):
            found = FileFacts(checkpoints.take(again=True, end=facts.moment == "end"), checkpoints.resumed())
        if not found.saves and found.restored is None:
            return facts
        self._state.saves_whole |= any(save.form == "state" and save.compared for save in found.saves)
        return dataclasses.replace(facts, saves=found.saves, restored=found.restored)


def _ran_in(forward: ForwardFact) -> Iterable[Mode]:
    """Other states in which layers ran inside one forward."""
    return () if forward.calls is None else forward.calls.odd.values()
