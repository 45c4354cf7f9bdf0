"""The life of one probed run: when to look, what was healthy, what to do.

All state is here. Observers hand in facts, checks judge them, the report writes; this module decides
when that happens. A **decision** is made once per step, at the first optimizer event of the step and
before the update wherever the event comes before it, and covers everything observed up to then. What
is seen later is judged by the next one. Nothing raises anywhere else.

Several ranks decide together (``agreement.py``), so whether there is a decision depends on the number of
the step and the cadence alone.
"""

from __future__ import annotations

import dataclasses
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lora_probe_callbacks.checks._base import OF_OWNED_TENSORS, Check, Verdict, skipped
from lora_probe_callbacks.checks._catalogue import explain, selected
from lora_probe_callbacks.checks.reachability import wrong_gradient
from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.distributed.consensus import Agreement
from lora_probe_callbacks.engine.collection import no_collection
from lora_probe_callbacks.engine.estimator import Estimation, look
from lora_probe_callbacks.engine.findings import Ledger, state_in_words
from lora_probe_callbacks.engine.saves import Checkpoints
from lora_probe_callbacks.engine.standing import Standing
from lora_probe_callbacks.engine.step_events import StepTracker
from lora_probe_callbacks.facts import (
    Coverage,
    EstimatorFact,
    Facts,
    ForwardFact,
    Mode,
    Moment,
    ReferenceFact,
    SavedFact,
    StartFact,
    StepResponse,
)
from lora_probe_callbacks.observe.device.step_reader import DeviceReader, Readings
from lora_probe_callbacks.observe.environment import environment
from lora_probe_callbacks.observe.forward.finite_difference import ResponseObserver
from lora_probe_callbacks.observe.forward.graph import capturing
from lora_probe_callbacks.observe.forward.hooks import ForwardObserver
from lora_probe_callbacks.observe.forward.replay import ForwardRepeat, KeptForward, random_state
from lora_probe_callbacks.observe.forward.weight_usage import WeightWitness
from lora_probe_callbacks.observe.history import History
from lora_probe_callbacks.observe.model.ownership import found_inf, grad_scale, tensors_of, unwrap_optimizer
from lora_probe_callbacks.observe.model.targets import NotJudgedError, Part, Scene
from lora_probe_callbacks.observe.model.unused import AdaptersElsewhere
from lora_probe_callbacks.report.console import finding_panel, health_table
from lora_probe_callbacks.report.findings import Finding, LoraProbeError, LoraProbeWarning, ProbeReport
from lora_probe_callbacks.report.metrics import (
    metrics_of_estimators,
    metrics_of_response,
    metrics_of_step,
    metrics_of_update,
)
from lora_probe_callbacks.report.record import Record, Row
from lora_probe_callbacks.restore.random import RandomState

__all__ = ["ProbeConfig", "ProbeSession"]

ALWAYS = 4  # the first steps are always probed: most faults are there from the start
_OF_FILES = ("LP801", "LP802", "LP803", "LP805", "LP807")  # what a saved file alone can be judged by
REPEATS_EVERY = 16  # after them, one probed step in so many runs a forward a second time
CLOSELY_EVERY = 16  # and after so many steps the graph is walked although gradients show that it is whole


class ProbeSession:
    """One probed run.

    Args:
        config: What was meant.
        log: Receives the metrics of a step and the framework's number of that step.
        main_rank: This process prints and records.
        on_stop: Called once when something fails under ``on_failure="stop"``.
    """

    def __init__(
        self,
        config: ProbeConfig,
        *,
        log: Callable[[dict[str, float], int], None] | None = None,
        main_rank: bool = True,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        self.config = config
        self._report = ProbeReport()
        self.should_stop = False
        self.step = 0
        self._log = log
        self._on_stop = on_stop
        self._console = Console() if main_rank and config.verbose else None
        self._record = Record(config.record) if main_rank and config.record is not None else None
        self._rows: list[Row] = []  # metrics that were logged and not recorded yet
        self._checks: list[Check] = list(selected(config.select, config.ignore))
        self._standing = Standing()
        self._ledger = Ledger(self._checks)
        self._running = False
        self._broken = False
        self._decided_start = False
        self._error: LoraProbeError | None = None
        self._skipped_in_a_row = 0
        self._ever_stepped = False
        self._merges = 0
        self._was_active: set[str] = set()
        self._elsewhere = AdaptersElsewhere()
        self._looked_at_start = False
        self._start: StartFact | None = None
        self._coverage: Coverage | None = None
        self._reference = None if config.reference is None else ReferenceFact(disabled=False, active=0)
        self._responses: tuple[StepResponse, ...] = ()
        self._checkpoints: Checkpoints | None = None
        self._restored: tuple[Mapping[str, Any], str, bool] | None = None  # before the start
        self._reads_files = main_rank
        self._estimates: list[EstimatorFact] = []
        self._zero_estimates: dict[str, int] = {}  # looks in a row at which all gradients of one were exactly zero
        self._told: set[str] = set()  # why estimates could not be computed
        self._agreement = Agreement([check.code for check in self._checks], self._alone)
        self._last_probed = False
        self._last_closely = 0
        self._overhead_ms = 0.0
        self._probed_steps = 0
        self._handles: list[RemovableHandle] = []

    # --- life -------------------------------------------------------------------------------

    @property
    def report(self) -> ProbeReport:
        """What was found so far."""
        self._list_findings()
        return self._report

    @property
    def metrics(self) -> Mapping[str, float]:
        """The latest value of every metric."""
        return self._report.metrics

    def _list_findings(self) -> None:
        self._report.findings = self._ledger.findings

    def start(
        self,
        roots: Iterable[tuple[str, nn.Module]],
        optimizers: Iterable[object],
        *,
        scaler: torch.amp.GradScaler | None = None,
        framework_step: Callable[[], int] | None = None,
    ) -> None:
        """Begin: find the adapters, take hold of the optimizers, arm the hooks of the first step.

        Args:
            roots: (name, module) pairs that hold what is trained.
            optimizers: The optimizers that step it; wrappers are opened.
            scaler: A gradient scaler, if the loop has one.
            framework_step: The framework's own step counter.

        Raises:
            ValueError: If there is no adapter, a name that does not exist, or no way to choose.
        """
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._scaler_round = None if self._scaler is None else self._scaler._per_optimizer_states
        self._framework_step = framework_step or (lambda: self.step)
        config = self.config
        try:
            self._scene = Scene(
                list(roots),
                [unwrap_optimizer(o) for o in optimizers],
                adapter=config.names,
                reference=config.reference_adapters,
                lagged=config.lagged_adapters,
                frozen=config.frozen,
            )
        except NotJudgedError as error:
            self._ledger.not_judged(f"could not judge: {error}", 0, 0)
            self._list_findings()
            return
        self._reader = DeviceReader(self._scene)
        self._estimation = None if config.estimator is None else Estimation(config.estimator, self._scene)
        self._guarded(lambda: self._agreement.enter([root for _, root in self._scene.roots]))
        self._saving(self._begin_saving)
        self._observer = ForwardObserver(before=self._before_forward, after=self._after_forward, on_error=self._break)
        self._watch()
        for index, optimizer in enumerate(self._scene.optimizers):
            self._handles.append(optimizer.register_step_pre_hook(self._before_step(index)))
            self._handles.append(optimizer.register_step_post_hook(self._after_step(index)))
        self._running = True
        self._begin_step()
        self._recorded(self._write_start)

    def _begin_saving(self) -> None:
        if any(check.code.startswith("LP8") for check in self._checks):
            self._checkpoints = Checkpoints(self._scene, reads=self._reads_files)
            if self._restored is not None:
                state, source, whole = self._restored
                self._checkpoints.restored(state, source, whole=whole)

    def _watch(self) -> None:
        """Observe the units that are expected now, from a clean slate."""
        self._history = History(len(self._scene.slots))
        self._observer.sharded = bool(self._scene.shards())
        self._observer.watch(self._scene.inventory, self._scene.units)

    @property
    def running(self) -> bool:
        """Between start and end."""
        return self._running

    def end(self) -> None:
        """End a run that went well: judge what is left, take all hooks away, print the table."""
        if not self._running:
            return
        try:
            self._decide("end", None)
        finally:
            self.close()
            self._finish_report()

    def abort(self, error: BaseException) -> None:
        """End a run that was left by an exception; what it shows of the adapter becomes a note on it.

        Args:
            error: The exception that is on its way to the user. It is never replaced.
        """
        if not self._running:
            return
        try:
            if not isinstance(error, LoraProbeError | KeyboardInterrupt | SystemExit | GeneratorExit):
                self._note_on(error)
        finally:
            self._agreement.leave(f"the run was left by {type(error).__name__}")
            self.close()
            self._finish_report()

    def close(self) -> None:
        """Remove every hook. May be called at any time and any number of times."""
        if not self._running:
            return
        self._running = False
        self._observer.disarm()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._let_go()
        self._agreement.close()

    def state_dict(self) -> dict[str, Any]:
        """What a later session should know: the last healthy state, and a fingerprint of what is trained now."""
        state: dict[str, Any] = {"baseline": self._ledger.baseline}
        checkpoints = self._checkpoints
        if checkpoints is not None:
            self._saving(lambda: state.update(fingerprint=checkpoints.state()))
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, source: str = "the checkpoint", whole: bool = False) -> None:
        """Take over what an earlier session knew; the next decision compares its fingerprint with what is here.

        Args:
            state: What :meth:`state_dict` returned.
            source: Where it comes from, for messages.
            whole: The adapter and the optimizer are restored from the same place, by a framework.
        """
        self._ledger.baseline = state.get("baseline")
        if state.get("fingerprint") is not None:
            self._restored = (state["fingerprint"], source, whole)
            if self._checkpoints is not None:
                self._checkpoints.restored(state["fingerprint"], source, whole=whole)

    # --- saves ------------------------------------------------------------------------------

    def save_announced(self, path: str | os.PathLike[str]) -> None:
        """A framework writes a checkpoint: the adapter is sampled now, and the file read at the next event.

        Args:
            path: The file or folder.
        """
        checkpoints = self._checkpoints
        if checkpoints is not None and not self._broken:
            step, framework_step = self._step_of("end"), self._framework_step()
            self._saving(lambda: checkpoints.announced(path, step, framework_step))

    def saves_written(self) -> None:
        """What was announced is complete: read it. After the end of the run it is judged at once."""
        checkpoints = self._checkpoints
        if checkpoints is None or self._broken:
            return
        if self._running:
            self._saving(checkpoints.look)
            return
        found: list[SavedFact] = []
        self._saving(lambda: found.extend(checkpoints.take(end=True)))
        if found:
            self._show(self._judge_saves(found, self._ledger)[1])

    def _show(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            if self._console is not None:
                self._console.print(finding_panel(finding))

    def restored_from(self, path: str | os.PathLike[str]) -> None:
        """The run goes on from a checkpoint that holds no state of this probe: the adapter should be its own.

        Args:
            path: The checkpoint.
        """
        checkpoints = self._checkpoints
        if checkpoints is not None and self._reads_files and os.path.exists(path):
            self._saving(lambda: checkpoints.check(path, self.step, self._framework_step(), running=True))

    def check_saved(self, path: str | os.PathLike[str]) -> ProbeReport:
        """Read a saved file back and compare every element with the adapter; see :class:`Checkpoints`.

        While training goes on, what fails is acted upon by the next decision as well. Nothing is raised here.

        Args:
            path: A folder or file of an adapter, or a checkpoint of the whole module.

        Returns:
            What was found in this file.
        """
        report = ProbeReport(judged_steps=1)
        checks = [check for check in self._checks if check.code in _OF_FILES]
        ledger = Ledger(checks)
        found: list[SavedFact] = []
        checkpoints = self._checkpoints
        if checkpoints is not None and not self._broken:
            step, framework_step = self._step_of("end"), self._framework_step()
            self._saving(lambda: found.extend(checkpoints.check(path, step, framework_step, running=self._running)))
        if found:
            self._judge_saves(found, ledger)
            if not self._running:
                self._show(self._judge_saves(found, self._ledger)[1])
        else:
            ledger.not_judged("could not judge: the probe has not begun, or has stepped aside", self.step, self.step)
        report.findings = ledger.findings
        return report

    def _judge_saves(self, found: Sequence[SavedFact], ledger: Ledger) -> tuple[dict[str, Verdict], list[Finding]]:
        """The verdicts on saved files alone, outside a decision."""
        first = found[0]
        facts = Facts("step", None, first.step, first.framework_step, (), False, (), (), (), (), ())
        facts = dataclasses.replace(facts, saves=tuple(found))
        verdicts = {code: v for code, v in self._judge(facts, only=_OF_FILES).items() if v.status != "pending"}
        changed = ledger.add(facts, verdicts)
        if ledger is self._ledger:
            self._list_findings()
        if ledger is self._ledger and changed and self._running:
            self._recorded(lambda record: self._write_record(record, facts, verdicts, changed))
        return verdicts, changed

    def _decide_on_files(self) -> None:
        """Between two probed steps nothing but a file may wait: the rest is not looked at for that."""
        checkpoints = self._checkpoints
        found: list[SavedFact] = []
        if checkpoints is not None:
            self._saving(lambda: found.extend(checkpoints.take()))
        if found:
            self._act(*self._judge_saves(found, self._ledger), "step")

    def _saving(self, work: Callable[[], object]) -> None:
        """An error of our own about a file ends these checks, and nothing else."""
        try:
            work()
        except Exception as error:
            self._internal(error)
            self._checkpoints = None
            checks = [check for check in self._checks if check.code.startswith("LP8")]
            reason = f"could not judge: {type(error).__name__} while a checkpoint was looked at: {error}"
            self._ledger.not_judged(reason, self.step, self._framework_step(), checks)
            self._list_findings()

    # --- steps ------------------------------------------------------------------------------

    @property
    def _probed(self) -> bool:
        borrows = self._estimation is not None and self._estimation.borrows(self.step)
        return self.step < ALWAYS or self.step % self.config.every_n_steps == 0 or borrows

    def _begin_step(self) -> None:
        self._now = StepTracker()
        self._repeat: ForwardRepeat | None = None
        self._response: ResponseObserver | None = None
        self._began_with: RandomState | None = None
        self._observer.reset()
        if not self._probed or (self._broken and not self._agreement.several):
            self._observer.disarm()
            return
        if self._broken:
            self._observer.arm()
            return
        due = self.step < ALWAYS or self.step - self._last_closely >= CLOSELY_EVERY
        if due:
            self._last_closely = self.step
        self._observer.closely = due or self._scene.packed()[0] > 0
        suspected = self._scene.suspected_weights()
        if suspected and not self._scene.inventory.compiled:
            self._observer.witness = WeightWitness(suspected)
        if self._repeat_due("LP405") and self.step:  # a forward can be stale only after a first update
            self._repeat = ForwardRepeat(self._scene.device)
        if self._repeat_due("LP307") and not wrong_gradient.hopeless(self._responses):
            tensors = [t for slot in self._scene.slots if (t := slot.tensor) is not None]
            self._response = ResponseObserver(tensors, self._observer.hook)
        self._observer.arm()

    def _repeat_due(self, code: str) -> bool:
        wanted = any(check.code == code for check in self._checks)
        return wanted and (self.step < ALWAYS or self._probed_steps % REPEATS_EVERY == REPEATS_EVERY - 1)

    def _end_step(self) -> None:
        if self._response is not None:
            self._response.forget()
        if not self._now.stepped & self._scene.owners():
            self._skipped_in_a_row += 1
        elif not self._now.left_to_it:  # else the next decision reads what it did
            self._has_stepped()
        self._was_active |= self._observer.active_seen
        self._merges += self._observer.merged_seen
        self._last_probed = self._probed or (self._estimation is not None and self._estimation.due(self.step))
        self.step += 1
        self._begin_step()

    def _let_go(self) -> None:
        """Of all tensors and of the hooks on them."""
        self._reader.forget()
        if self._response is not None:
            self._response.forget()
        if self._estimation is not None and (not self._running or self._broken):
            self._estimation.forget()

    def _has_stepped(self) -> None:
        self._ever_stepped = True
        self._skipped_in_a_row = 0

    def _end_step_if_done(self) -> None:
        if self._now.done(self._scene.owners()):
            self._end_step()

    # --- events -----------------------------------------------------------------------------

    def gradients_ready(self, optimizer: object) -> None:
        """Tell that the gradients of this step are complete and the optimizer is about to step.

        Only a framework that runs forward and backward inside ``step()`` needs to tell; elsewhere
        torch's own step hooks do. The user's code may still change the gradients (clipping).

        Args:
            optimizer: The optimizer, or a wrapper around it.

        Raises:
            LoraProbeError: If something fails and ``on_failure`` is ``"raise"``.
        """
        inner = unwrap_optimizer(optimizer)
        for index, known in enumerate(self._scene.optimizers if self._running else ()):
            if known is inner:
                self._optimizer_event(index, final=False)

    def _before_step(self, index: int) -> Callable[..., None]:
        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._running or capturing():
                return
            closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
            if closure is None:
                self._optimizer_event(index, final=True)
                if self._probed and not self._broken:
                    self._guarded(lambda: self._reader.read_scaled(index))
            else:  # the gradients of this step are made inside: only the tensors can be looked at
                if index in self._now.stepped:
                    self._begins_again(index)
                if self._probed:
                    self._guarded(self._scene.look)
                    self._guarded(lambda: self._reader.copy(index))
                self._before_update(inside=True)
            self._now.inside.add(index)

        return hook

    def _after_step(self, index: int) -> Callable[..., None]:
        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._running or capturing():
                return
            if index not in self._now.ready:  # a closure: only now the gradients of this step can be seen
                self._optimizer_event(index, final=False)
            if self._checkpoints is not None:
                self._checkpoints.stepped_at = time.time()
            self._now.has_stepped(index, left_to_it=found_inf(optimizer) is not None)
            copies = self._scene.copies
            if copies is not None and not self._broken:
                self._guarded(lambda: copies.stepped(self.step, self._framework_step()))
            if self._probed and not self._broken:
                self._guarded(lambda: self._reader.read_after(index, self.step, self._framework_step()))
            if self._now.done(self._scene.owners()):
                self._measure_response()
                self._estimate()
                self._end_step()

        return hook

    def _optimizer_event(self, index: int, *, final: bool) -> None:
        self._observer.close_witness()
        if index in self._now.stepped:
            self._begins_again(index)
        elif not final and self._now.announced_twice(index):
            self._now.discarded.add(index)
            self._end_step_if_done()
        first = index not in self._now.ready
        self._now.ready.add(index)
        self._raise_again()
        if not self._now.decided:
            self._now.decided = True
            # Whether something waits may differ between ranks, of which one may have skipped its last step.
            waiting = self._last_probed if self._agreement.several else self._waits
            if self._probed or waiting:
                self._decide("step", index, final=final)
            elif self._checkpoints is not None and not self._broken and not self._agreement.several:
                self._decide_on_files()
        elif first and self._probed:  # a further optimizer of a step that is decided already
            self._guarded(self._scene.look)
            self._guarded(lambda: self._reader.read_gradients(index, unowned=False))
        self._before_update()
        if self._probed and not self._broken:
            self._guarded(lambda: self._reader.copy(index))
            self._guarded(self._reader.read_others_before)

    def _before_update(self, *, inside: bool = False) -> None:
        """What the estimator and the step response start from; a closure makes its gradients ``inside`` the step."""
        estimation, response = self._estimation, self._response
        if estimation is not None and not self._broken:
            self._guarded(lambda: estimation.stepping(self.step))
        if response is not None and not self._broken:
            self._guarded(lambda: response.stepping(inside=inside))

    @property
    def _waits(self) -> bool:
        """Something was observed that no decision has judged yet."""
        restored = self._checkpoints is not None and self._checkpoints.to_compare
        return self._reader.waiting or bool(self._estimates) or restored

    def _begins_again(self, index: int) -> None:
        self._now.begins_again(index, self._scene.owners(), self._scene.has_gradients)
        self._end_step_if_done()

    def _before_forward(self, module: nn.Module) -> None:
        """A candidate for a training forward is about to run."""
        self._scene.inside_forward = True
        try:
            self._forward_begins(module)
        finally:
            self._scene.inside_forward = False

    def _forward_begins(self, module: nn.Module) -> None:
        if not self._decided_start:
            self._decided_start = True
            if not self._broken:
                self._guarded(self._settle_expected)
            self._decide("start", None)
        owners = self._scene.owners()
        received = any(c.received for c in self._observer.candidates)
        discarded = self._scaler_went_on()  # zeros in place of gradients do not tell
        self._now.next_forward(received, owners, lambda o: not discarded and self._scene.has_gradients(o))
        if self._now.done(owners):  # the update never came
            if not self._now.decided:
                self._now.decided = True
                self._decide("skipped", None)
            self._end_step()
        self._raise_again()
        self._agreement.forward_begins()
        if self._broken:
            return
        if self._estimation is not None:
            self._estimation.forward_begins(self._scene.device)
        if self._repeat is not None or self._response is not None:
            self._began_with = random_state(module)

    def _scaler_went_on(self) -> bool:
        """The scaler was updated since the last training forward: what it had to step is stepped or skipped."""
        if self._scaler is None:
            return False
        # torch 2.13: update() begins a new table of what every optimizer has been through.
        before, self._scaler_round = self._scaler_round, self._scaler._per_optimizer_states
        return before is not self._scaler_round

    def _settle_expected(self) -> None:
        """The module's own hooks may have activated another adapter since the session began."""
        names, former = self._scene.active_names(), self._scene.expected
        # ... or this is the forward of a reference, which no optimizer owns.
        if names != former and (self._scene.owned(names) or not self._scene.owned(former)):
            self._scene.expect(names)
            self._saving(self._begin_saving)
            self._watch()
            self._begin_step()

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Directly after a candidate, before its backward: run it again where that is due."""
        if self._estimation is not None and not self._broken:
            self._estimation.forward_ends(args, kwargs)
        if self._began_with is None:
            return output
        kept = KeptForward(module, args, kwargs, self._began_with, self._scene.device)
        if self._repeat is not None:
            with self._observer.aside():
                self._repeat.after(kept, output)
        return output if self._response is None else self._response.after(kept, output)

    def _measure_response(self) -> None:
        """Directly after the update: what did it do to the loss?"""
        response = self._response
        if response is None or self._broken:
            return
        scales = [s for o in self._scene.optimizers if (s := grad_scale(o)) is not None]
        scale = float(scales[0]) if scales else 1.0 if self._scaler is None else float(self._scaler.get_scale())

        def measure() -> None:
            with self._observer.aside():
                found = response.measure(self.step, self._framework_step(), scale, wrong_gradient.unsettled)
            self._responses = (*self._responses, found)[-ALWAYS:]
            self._log_row(metrics_of_response(found), found.framework_step)

        self._guarded(measure)

    def _estimate(self) -> None:
        """Directly after a step: the estimator, where it is due. Never inside a closure or a forward."""
        estimation = self._estimation
        if estimation is None or self._broken:
            return

        def estimate() -> None:
            with self._observer.aside():
                done = estimation.stepped(self.step, self._framework_step())
            for fact, row in done:
                self._keep(fact)
                if row:
                    self._log_row(row, fact.framework_step)

        self._guarded(estimate)

    def watch(self, value: object, *, name: str = "S", direction: object = None) -> None:
        """Look at an estimator of the user's own; it is judged by the next decision, and nothing of it is kept.

        Args:
            value: What it differentiates, a tensor with a graph; or the gradients of its loss, by parameter,
                id or name.
            name: What messages call it.
            direction: The update direction mu_Y that it is projected on, if there is one: an
                ``UpdateDirection``, or a mapping by parameter, id or name.
        """
        if not self._running or self._broken:
            return

        def watch() -> None:
            step, framework_step = self.step, self._framework_step()
            self._keep(
                look(value, direction, self._scene, self._observer, name=name, step=step, framework_step=framework_step)
            )

        self._guarded(watch)

    def _keep(self, fact: EstimatorFact) -> None:
        if fact.missing is not None:
            row = self._zero_estimates.get(fact.name, 0) + 1 if fact.zero else 0
            self._zero_estimates[fact.name] = row
            fact = dataclasses.replace(fact, zero=row)
        self._estimates.append(fact)
        if fact.why_not is not None and fact.why_not not in self._told and self._console is not None:
            self._told.add(fact.why_not)
            self._console.print(f"LoRA probe, estimator {fact.name!r}: {fact.why_not}")

    def rehearse(self, stepped: Callable[[Optimizer], AbstractContextManager[None]]) -> None:
        """Judge one step that is taken back at once.

        Args:
            stepped: A context in which an optimizer has stepped, and after which it has not.
        """
        for index, optimizer in enumerate(self._scene.optimizers if self._running else ()):
            self._optimizer_event(index, final=True)
            with stepped(optimizer):
                self._guarded(partial(self._reader.read_after, index, self.step, self._framework_step()))
                self._measure_response()
                self._estimate()
            self._ever_stepped = True

    # --- deciding ---------------------------------------------------------------------------

    def _decide(self, moment: Moment, optimizer: int | None, *, final: bool = False) -> None:
        """Judge everything observed up to now, once; tell it, and act on it."""
        together = self._agreement.several
        if self._broken and not together:
            return
        began = time.perf_counter()
        with no_collection():  # up to where the facts of the last decision are let go
            facts, verdicts = self._look(moment, optimizer, final=final)
            if together:
                judge = partial(self._judge, between=True)
                facts, verdicts = self._agreement.decide(facts, verdicts, broken=self._broken, judge=judge)
            try:
                changed = self._ledger.add(facts, verdicts)
            except Exception as error:
                self._break(error)
                return
        if self._ledger.news:
            self._list_findings()
        self._overhead_ms += (time.perf_counter() - began) * 1e3
        if not self._broken:
            self._emit(facts)
            self._recorded(lambda record: self._write_record(record, facts, verdicts, changed))
        self._act(verdicts, changed, moment)

    def _look(self, moment: Moment, optimizer: int | None, *, final: bool) -> tuple[Facts, dict[str, Verdict]]:
        """The facts and verdicts of this rank; nothing at all if its probe is broken."""
        if not self._broken:
            try:
                facts = self._collect(moment, optimizer, final=final)
                return facts, self._judge(facts)
            except Exception as error:
                self._break(error)
        step, framework_step = self.step, self._framework_step()
        return Facts(moment, optimizer, step, framework_step, (), False, (), (), (), (), ()), {}

    def _collect(self, moment: Moment, optimizer: int | None, *, final: bool) -> Facts:
        if self._scene.refresh():
            history = self._history
            self._watch()
            if len(history) == len(self._history):
                self._history = history
        probed = optimizer is not None and self._probed
        if probed and optimizer is not None:
            self._reader.read_gradients(optimizer, unowned=True)
            self._reader.copy(optimizer)
        if self._agreement.several:
            self._reader.read_samples(optimizer if probed else None)
        self._reader.send(cotangents=self._observer.cotangents(), sample=probed)
        # An accelerator is still busy with the backward at this time: what needs no values is looked at meanwhile.
        seen = self._structure(moment, optimizer, final=final)
        units = self._scene.left_out(seen["forwards"], self._observer.called()), self._scene.factors()
        readings = self._reader.receive(final=optimizer if final and probed else None, merges=self._merges)
        return self._with_files(self._facts(seen, units, readings))

    def _with_files(self, facts: Facts) -> Facts:
        """What was saved and restored since the last decision."""
        checkpoints = self._checkpoints
        if checkpoints is None:
            return facts
        pairs = zip(facts.history, facts.slots, strict=True)
        checkpoints.moved = checkpoints.moved or any(h.had_move and s.role == "B" for h, s in pairs)
        found: dict[str, Any] = {}
        self._saving(lambda: found.update(saves=checkpoints.take(again=True, end=facts.moment == "end")))
        self._saving(lambda: found.update(restored=checkpoints.resumed()))
        return dataclasses.replace(facts, **found) if any(found.values()) else facts

    def _structure(self, moment: Moment, optimizer: int | None, *, final: bool) -> dict[str, Any]:
        """The fields of the facts that need no value from a device."""
        scene, observer, inventory = self._scene, self._observer, self._scene.inventory
        if not self._looked_at_start:
            self._looked_at_start = True
            self._look_at_start()
        modes, active = observer.state()
        forwards = observer.facts(scene.seen())
        self._look_beside(forwards, moment)
        replaced, foreign = scene.replaced()
        return {
            "moment": moment,
            "optimizer": optimizer,
            "step": self._step_of(moment),
            "framework_step": self._framework_step(),
            "expected": scene.expected,
            "declared": scene.declared is not None,
            "slots": scene.slot_facts(),
            "rates": scene.rates(),
            "modes": modes,
            "active": active,
            "forwards": forwards,
            "forwards_without_grad": observer.without_grad,
            "unobservable": observer.unobservable,
            "gradients_final": final,
            "trainable_bases": scene.trainable_bases(),
            "replaced": replaced,
            "foreign_in_optimizer": foreign,
            "optimizer_tensors": len(tensors_of(scene.optimizers)),
            "optimizers": len(scene.optimizers),
            "nested": tuple(inventory.nested),
            "rewrapped": tuple(inventory.rewrapped),
            "unloaded": tuple(inventory.unloaded),
            "vanished": () if inventory.unloaded else scene.vanished(),
            "scaler": self._scaler is not None or any(grad_scale(o) is not None for o in scene.optimizers),
            "packed": scene.packed(),
            "stale_forward": None if self._repeat is None else self._repeat.stale,
            "why_not_repeated": None if self._repeat is None else self._repeat.why_not,
            "responses": self._responses,
            "estimators": tuple(self._estimates),
            "why_not_owned": scene.why_not_owned(),
            "resumed": self.config.resumed,
            "reference": self._reference,
            "new_tokens": tuple(self.config.new_token_ids),
            "start": self._start if self._start and len(self._start.units) == len(scene.units) else None,
            "coverage": self._coverage,
        }

    def _facts(
        self, seen: dict[str, Any], units: tuple[Sequence[Part] | None, Sequence[float | None]], readings: Readings
    ) -> Facts:
        scene, observer = self._scene, self._observer
        self._history.advance(
            seen["slots"], seen["rates"], readings.gradients, readings.moves, readings.update, self.step
        )
        if readings.followers is not None:
            scene.followers.advance(readings.followers, self.step, moved=_moved(readings))
        if readings.copies is not None and scene.copies is not None:
            scene.copies.advance(readings.copies)
        overflow = seen["scaler"] and any(g is not None and not g.finite for g in readings.gradients)
        if readings.skipped_inside:
            self._skipped_in_a_row += 1
        elif readings.skipped_inside is not None:
            self._has_stepped()
        skipped = self._skipped_in_a_row + (seen["moment"] == "skipped" or overflow)
        used = observer.witness.seen if observer.witness is not None else {}
        was_active = self._was_active | observer.active_seen
        facts = Facts(
            **seen,
            units=scene.unit_facts(*units, readings.gradients, used),
            history=self._history.rows,
            reads=self._history.reads,
            gradients=readings.gradients,
            gradient_norms=readings.gradient_norms,
            update=readings.update,
            moves=readings.moves,
            others=scene.other_facts(readings.others_before, readings.others_after, was_active),
            base_drift=readings.drift,
            copies=None if scene.copies is None or seen["replaced"] else scene.copies.fact(),
            token_rows=tuple(rows.fact() for rows in self._reader.token_rows),
            skipped_in_a_row=skipped,
            ever_stepped=self._ever_stepped,
            # Reading the scale costs a transfer: only when steps are being skipped.
            loss_scale=float(self._scaler.get_scale()) if self._scaler is not None and skipped else None,
            all_non_finite=readings.all_non_finite,
        )
        self._estimates.clear()
        facts = self._agreement.add_wrapping(facts, scene, observer.called(), readings)
        if facts.nobody_called and not any(map(scene.has_gradients, range(len(scene.optimizers)))):
            # Else something beside the adapter is trained first.
            elsewhere = self._elsewhere.look([layer.module for layer in scene.inventory.layers])
            facts = dataclasses.replace(facts, elsewhere=elsewhere)
        return facts

    def _alone(self, reason: str, facts: Facts) -> None:
        checks = [check for check in self._checks if check.code.startswith("LP7")]
        self._ledger.not_judged(reason, facts.step, facts.framework_step, checks)

    def _look_at_start(self) -> None:
        """Values and names, once; models differ most here, and what cannot be read ends these checks alone."""
        try:
            self._start = self._scene.start(self._framework_step())
            self._coverage = self._scene.coverage(self.config.expect_targets, self.config.new_token_ids)
            self._reader.token_rows = self._scene.rows_of(self.config.new_token_ids)
            self._observer.watch_tokens(self._reader.token_rows)
        except Exception as error:
            self._internal(error)
            left = [c for c in self._checks if c.code in ("LP503", "LP504") or c.code.startswith("LP6")]
            self._checks = [c for c in self._checks if c not in left]
            reason = f"could not judge: {type(error).__name__} when the model was looked at"
            self._ledger.not_judged(reason, self.step, self._framework_step(), left)

    def _look_beside(self, forwards: tuple[ForwardFact, ...], moment: Moment) -> None:
        """Did a forward run with the adapters disabled, where the loss compares with it?"""
        if self._reference is None:
            return
        modes = {*self._observer.beside, *(m for f in forwards for m in _ran_in(f))}
        # With gradients and never differentiated: a reference that is detached afterwards.
        if any(f.received for f in forwards):
            aside = [f for f in forwards if not f.received]
            modes |= {f.mode(u) for f in aside for u in range(len(self._scene.units)) if f.called(u) is not False}
        active = "active" in modes and moment in ("step", "skipped")
        self._reference = ReferenceFact(
            disabled=self._reference.disabled or "disabled" in modes, active=self._reference.active + active
        )

    def _step_of(self, moment: Moment) -> int:
        """At the end, the step that would come next has not begun unless a forward was seen."""
        over = moment == "end" and self.step and not self._observer.candidates
        return self.step - 1 if over else self.step

    def _judge(self, facts: Facts, *, between: bool = False, only: Iterable[str] = ()) -> dict[str, Verdict]:
        """The verdicts on one set of facts; those ``between`` ranks need what the other ranks have sent."""
        verdicts: dict[str, Verdict] = {}
        apart = between or bool(only)  # facts of their own, in which almost all differs: nothing falls for that
        for check in list(self._checks):
            if (between and not check.code.startswith("LP7")) or (only and check.code not in only):
                continue
            try:
                if facts.why_not_owned and check.code in OF_OWNED_TENSORS:
                    verdicts[check.code] = skipped(facts.why_not_owned)
                else:
                    verdicts[check.code] = check.judge(facts) if apart else self._standing.judge(check, facts)
            except Exception as error:
                self._internal(error)
                self._checks.remove(check)
                reason = f"could not judge: {type(error).__name__} inside the check"
                self._ledger.not_judged(reason, facts.step, facts.framework_step, [check])
        return explain(verdicts)

    # --- telling and acting -----------------------------------------------------------------

    def _emit(self, facts: Facts) -> None:
        """Metrics of an update belong to its own step, which lies behind the one being decided."""
        if facts.update is not None:
            self._log_row(metrics_of_update(facts), facts.update.framework_step)
        for framework_step, reached in metrics_of_estimators(facts).items():
            self._log_row(reached, framework_step)
        if facts.moment not in ("step", "skipped") or not self._probed:
            return
        self._probed_steps += 1
        self._report.judged_steps += 1
        row = metrics_of_step(facts)
        row["lora_probe/healthy"] = float(not self._ledger.failing)
        row["lora_probe/overhead_ms"] = self._overhead_ms
        self._log_row(row, facts.framework_step)
        self._overhead_ms = 0.0

    def _log_row(self, row: dict[str, float], framework_step: int) -> None:
        self._report.metrics.update(row)
        self._report.history.add(framework_step, row)
        if self._record is not None:
            self._rows.append((framework_step, row))
        if self._log is not None:
            log = self._log
            self._guarded(lambda: log(row, framework_step))

    def _act(self, verdicts: Mapping[str, Verdict], changed: list[Finding], moment: Moment) -> None:
        codes = {code for code, verdict in verdicts.items() if verdict.status == "fail"}
        failing = [f for f in self.report.failures if f.code in codes] if codes else []
        raising = bool(failing) and self.config.on_failure == "raise" and moment != "exception"
        for finding in changed:
            if self._console is not None and not (raising and finding.status == "fail"):
                self._console.print(finding_panel(finding))
            if self.config.on_failure == "warn" and finding.status == "fail" and moment != "exception":
                warnings.warn(str(finding), LoraProbeWarning, stacklevel=2)
        if failing and self.config.on_failure == "stop" and not self.should_stop:
            self.should_stop = True
            if self._on_stop is not None:
                self._on_stop()
        if raising:
            self._observer.disarm()  # nobody may tell us that the loop is left; the step hooks stay to raise again
            self._let_go()
            self._error = LoraProbeError(failing)
            raise self._error

    def _raise_again(self) -> None:
        """Somebody swallowed our error: the adapter still does not train."""
        if self._error is not None:
            raise LoraProbeError(self._error.findings)

    def _note_on(self, error: BaseException) -> None:
        """Judge the facts at hand and put what fails on the user's own exception; another rank may know why."""
        known = {(f.code, f.cause) for f in self.report.failures}
        self._decide("exception", None)
        for finding in self.report.failures:
            if (finding.code, finding.cause) not in known:
                error.add_note(f"lora_probe: {finding}")

    def _finish_report(self) -> None:
        self._recorded(lambda record: record.end(self.report, self.step))
        if self._console is not None:
            self._console.print(health_table(self.report))

    def _write_start(self, record: Record) -> None:
        scene = self._scene
        record.start(
            self._checks,
            environment(t.device for slot in scene.slots if (t := slot.tensor) is not None),
            adapters=scene.expected,
            tensors=len(scene.slots),
            model=[type(module).__name__ for _, module in scene.roots],
            optimizers=[type(optimizer).__name__ for optimizer in scene.optimizers],
            every_n_steps=self.config.every_n_steps,
            on_failure=self.config.on_failure,
        )

    def _write_record(
        self, record: Record, facts: Facts, verdicts: Mapping[str, Verdict], changed: list[Finding]
    ) -> None:
        if facts.moment == "step" and not self._probed:  # only for what waited to be judged: nothing else was looked at
            verdicts = {code: v for code, v in verdicts.items() if v.status != "pending"}
        record.decision(facts, verdicts, changed, self._rows, state_in_words(facts))
        self._rows = []

    def _recorded(self, write: Callable[[Record], None]) -> None:
        """A full disk ends the record, not the probing."""
        if self._record is None:
            return
        record = self._record
        try:
            write(record)
        except OSError as error:
            self._record = None
            self._internal(error, "the record ends here")
        except Exception as error:
            self._break(error)

    # --- errors of our own ------------------------------------------------------------------

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """An observer failed: the probe steps aside, says so, and training goes on."""
        if self._broken:
            return
        self._broken = True
        self._internal(error)
        if self._agreement.several:
            self._observer.bare = True  # the others count on this rank at every decision
        else:
            self._observer.disarm()
        self._observer.close_witness()
        self._let_go()
        self._repeat = self._response = self._began_with = None
        reason = f"could not judge: {type(error).__name__} inside the probe: {error}"
        self._ledger.not_judged(reason, self.step, self._framework_step())
        self._list_findings()

    def _internal(self, error: BaseException, what: str = "could not judge") -> None:
        text = "".join(traceback.format_exception(error))
        if text in self._report.internal_errors:
            return
        self._report.internal_errors.append(text)
        if self._console is not None:
            self._console.print(f"LoRA probe: {what}, training goes on: {type(error).__name__}: {error}")
        self._recorded(lambda record: record.error(self.step, text))


def _moved(readings: Readings) -> bool:
    """The last update has moved the adapter."""
    return any(move is not None and move.moved for move in readings.moves)


def _ran_in(forward: ForwardFact) -> Iterator[Mode]:
    """Other states in which layers ran inside one forward."""
    for _, _, other in forward.calls or ():
        if other is not None:
            yield other
