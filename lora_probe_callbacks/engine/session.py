"""The life of one probed run: what begins it, what ends it, and what a user may ask of it in between.

The parts do the work: ``step_events`` follows the steps, ``collector`` makes the facts of a decision, ``decision``
judges them and acts, ``proofs`` and ``findings`` keep what they come to, ``telling`` tells it. Here they are put
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from lora_probe_callbacks.checks._base import Need
from lora_probe_callbacks.checks._catalogue import selected
from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.distributed.consensus import Agreement
from lora_probe_callbacks.engine.cadence import Cadence
from lora_probe_callbacks.engine.collector import Collector, Observers
from lora_probe_callbacks.engine.decision import Decisions, Judge
from lora_probe_callbacks.engine.estimator import Estimates, Estimation
from lora_probe_callbacks.engine.examples import Examples
from lora_probe_callbacks.engine.findings import Ledger
from lora_probe_callbacks.engine.forward_events import ForwardEvents
from lora_probe_callbacks.engine.proofs import ProofBook, claims_of
from lora_probe_callbacks.engine.rerun import Reruns
from lora_probe_callbacks.engine.rollouts import Rollouts
from lora_probe_callbacks.engine.run_files import RunFiles
from lora_probe_callbacks.engine.run_state import RunState
from lora_probe_callbacks.engine.step_events import StepEvents
from lora_probe_callbacks.engine.telling import Teller
from lora_probe_callbacks.facts import Claim, Facts, Proof
from lora_probe_callbacks.observe.environment import environment
from lora_probe_callbacks.observe.forward.hooks import ForwardObserver
from lora_probe_callbacks.observe.model.ownership import unwrap_optimizer
from lora_probe_callbacks.observe.model.targets import NotJudgedError, Targets
from lora_probe_callbacks.report.findings import Finding, LoraProbeError
from lora_probe_callbacks.report.report import ProbeReport
from lora_probe_callbacks.report.supervision import SupervisionReport

__all__ = ["ProbeConfig", "ProbeSession"]


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
        self._teller = Teller(config, log, main_rank)
        self._errors = self._teller.errors
        checks = selected(config.select, config.ignore)
        self._ledger = Ledger(checks)
        self._judge = Judge(checks, self._errors, self._ledger)
        self._state = RunState(framework_step=lambda: self._state.step)
        self._proofs = ProofBook(claims_of(checks), lapsed=lambda: self._state.backwards.lapsed)
        self._agreement = Agreement([check.code for check in checks], self._alone)
        self._decisions = Decisions(
            config, self._judge, self._ledger, self._proofs, self._teller, self._agreement, self._errors, on_stop
        )
        self._estimates: Estimates | None = None
        self._ended = False
        self.questions: list[str] = []  # what else keeps this run from being called healthy
        self._report = _LiveReport(self)
        self.files = RunFiles(
            self._state, self._judge, self._ledger, self._proofs, self._decisions, self._teller, reads=main_rank
        )
        self.rollouts = Rollouts(config, self._state, self._errors)
        self._errors.on("probe", self._break)
        self._errors.on("initial look", self._no_look)

    # --- life -------------------------------------------------------------------------------

    def start(
        self,
        roots: Iterable[tuple[str, nn.Module]],
        optimizers: Iterable[object],
        *,
        scaler: torch.amp.GradScaler | None = None,
        framework_step: Callable[[], int] | None = None,
        accumulation: int | None = None,
        tokenizer: object = None,
        thaw_announced: bool = False,
    ) -> None:
        """Begin: find the adapters, take hold of the optimizers, arm the hooks of the first step.

        Args:
            roots: (name, module) pairs that hold what is trained.
            optimizers: The optimizers that step it; wrappers are opened.
            scaler: A gradient scaler, if the loop has one.
            framework_step: The framework's own step counter.
            accumulation: Backward passes to a step, where the framework says so.
            tokenizer: Of the model, where the framework hands it over and the user did not.
            thaw_announced: The framework will thaw what is frozen now.

        Raises:
            ValueError: If there is no adapter, a name that does not exist, or no way to choose.
        """
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        state = self._state
        state.framework_step, state.accumulation = framework_step or (lambda: state.step), accumulation
        state.tokenizer = tokenizer if self.config.tokenizer is None else self.config.tokenizer
        state.thaw_announced = thaw_announced
        opened = [unwrap_optimizer(optimizer) for optimizer in optimizers]
        with _attaching(self):
            self._attach(Targets(list(roots), opened, self.config), scaler)

    def _attach(self, targets: Targets, scaler: torch.amp.GradScaler | None) -> None:
        state = self._state
        self._targets = targets
        self._assemble(targets, scaler)
        with self._errors.contain():
            self._agreement.enter([root for _, root in targets.roots])
        self.files.begin(self._targets, self._collector)
        self._collector.watch()
        self._proofs.begin(len(targets.slots))
        self._events.install()
        state.running = True
        self._events.begin_step()
        self._teller.begin(self._judge.checks, targets, lambda: state.step)

    def judge_ownership(self) -> None:
        """Where a framework tells that training starts: say now what cannot be mended before the first forward.

        Raises:
            LoraProbeError: If no optimizer owns anything of the adapter, and ``on_failure`` is ``"raise"``.
        """
        if self.running and not self._targets.owned(self._targets.expected):
            self._decisions.decide_ownership()

    def _assemble(self, targets: Targets, scaler: torch.amp.GradScaler | None) -> None:
        state, config = self._state, self.config
        needs: frozenset[Need] = frozenset(need for check in self._judge.checks for need in check.needs)
        self._observers = Observers(targets)
        self._hooks = ForwardObserver(
            before=lambda module: self._forwards.before_forward(module),
            after=lambda module, args, kwargs, output: self._forwards.after_forward(module, args, kwargs, output),
            on_error=lambda error: self._errors.report(error),
        )
        self._collector = Collector(
            config, needs, state, self._observers, self._hooks, self._agreement, self._errors, scaler
        )
        self._decisions.begin(state, self._collector, self._release)
        self.rollouts.begin(targets, self._hooks, self._collector)
        estimation = None if config.estimator is None else Estimation(config.estimator, targets)
        examples = Examples(config.examples, targets, self._hooks, self._teller, scaler)
        self._estimates = Estimates(estimation, examples, state, targets, self._hooks, self._collector, self._teller)
        self._reruns = Reruns(needs, state, self._observers, self._hooks, self._collector, self._teller, scaler)
        cadence = Cadence(
            config.every_n_steps,
            alone=lambda: not self._agreement.several,
            borrows=self._estimates.borrows,
            proven=lambda: self._proofs.complete,
            unstepped=lambda: not state.ever_stepped or state.backwards.overdue,
        )
        self._events = StepEvents(
            state=state,
            cadence=cadence,
            observers=self._observers,
            hooks=self._hooks,
            collector=self._collector,
            decisions=self._decisions,
            estimates=self._estimates,
            reruns=self._reruns,
            agreement=self._agreement,
            errors=self._errors,
        )
        self._forwards = ForwardEvents(
            steps=self._events,
            state=state,
            observers=self._observers,
            hooks=self._hooks,
            decisions=self._decisions,
            estimates=self._estimates,
            reruns=self._reruns,
            agreement=self._agreement,
            errors=self._errors,
            scaler=scaler,
            settle=self._settle,
        )

    def _settle(self) -> None:
        """The module's own hooks may have activated another adapter since the session began."""
        targets = self._targets
        exchanged, names, former = targets.exchanged(), targets.active_names(), targets.expected
        # ... or this is the forward of a reference, which no optimizer owns.
        renamed = names != former and (targets.owned(names) or not targets.owned(former))
        if renamed:
            targets.expect(names)
        if renamed or exchanged:
            self._observers.settle()
            self.files.begin(self._targets, self._collector)
            self._collector.watch()
            self._proofs.begin(len(targets.slots))
            self._events.begin_step()

    @property
    def running(self) -> bool:
        """Between start and end."""
        return self._state.running

    def end(self) -> None:
        """End a run that went well: judge what is left, take all hooks away, print the report."""
        if not self.running:
            return
        try:
            self._decisions.decide("end", None, self._collector.step_of("end"), probed=False)
        finally:
            self._finish()

    def abort(self, error: BaseException) -> None:
        """End a run that was left by an exception; what it shows of the adapter becomes a note on it.

        Args:
            error: The exception that is on its way to the user. It is never replaced.
        """
        if not self.running:
            return
        try:
            if not isinstance(error, LoraProbeError | KeyboardInterrupt | SystemExit | GeneratorExit):
                self._decisions.note_on(error, self._state.step)
        finally:
            self._agreement.leave(f"the run was left by {type(error).__name__}")
            self._finish()

    def _finish(self) -> None:
        self.close()
        self._ended = True
        self._teller.end(self.report)

    def close(self) -> None:
        """Remove every hook. May be called at any time and any number of times."""
        if not self.running:
            return
        self._state.running = False
        self._hooks.disarm()
        self._events.remove()
        self._let_go()
        self._agreement.close()

    def _release(self) -> None:
        """Take hooks and tensors away; those on the optimizers stay, to raise again if the error is swallowed."""
        self._hooks.disarm()
        self._let_go()

    def _let_go(self) -> None:
        """Release all tensors and the hooks on them."""
        self._state.backwards.remove()
        self._observers.reader.forget()
        self._reruns.forget()
        self.rollouts.forget()
        if self._estimates is not None and (not self.running or self._state.broken):
            self._estimates.forget()

    # --- what was found ---------------------------------------------------------------------

    @property
    def report(self) -> ProbeReport:
        """What was found and proven so far; it follows the run."""
        return self._report

    @property
    def should_stop(self) -> bool:
        """Something failed under ``on_failure="stop"``."""
        return self._decisions.should_stop

    # --- what is asked ----------------------------------------------------------------------

    def gradients_ready(self, optimizer: object) -> None:
        """Tell that the gradients of this step are complete and the optimizer is about to step.

        Only a framework that runs forward and backward inside ``step()`` needs to; elsewhere torch's hooks tell.

        Args:
            optimizer: The optimizer, or a wrapper around it.

        Raises:
            LoraProbeError: If something fails and ``on_failure`` is ``"raise"``.
        """
        if self.running:
            self._events.gradients_ready(optimizer)

    def watch(self, value: object, *, name: str = "S", direction: object = None) -> None:
        """Look at an estimator of the user's own; it is judged by the next decision, and nothing of it is kept.

        Args:
            value: A tensor with a graph that it differentiates, or gradients of its loss by parameter, id or name.
            name: What messages call it.
            direction: mu_Y, if it is projected on one: an ``UpdateDirection``, or a mapping by parameter, id or name.
        """
        if self.running and not self._state.broken and self._estimates is not None:
            with self._errors.contain():
                self._estimates.watch(value, direction, name)

    def rehearse(self, stepped: Callable[[Optimizer], bool]) -> None:
        """Judge one step that the caller takes back; ``stepped`` lets an optimizer make it, and says whether it did."""
        if self.running:
            self._events.rehearse(stepped)

    # --- giving up --------------------------------------------------------------------------

    def _break(self, error: BaseException) -> None:
        """An observer failed: the probe steps aside, and training goes on."""
        state = self._state
        if state.broken:
            return
        state.broken = True
        self._ledger.not_judged(
            f"could not judge: {type(error).__name__} inside the probe: {error}", state.step, state.framework_step()
        )
        if not hasattr(self, "_events"):
            return
        if not self.running:
            self._events.remove()
        if self._agreement.several:
            self._hooks.log.bare = True  # the others count on this rank at every decision
        else:
            self._hooks.disarm()
        self._hooks.close_witness()
        self._let_go()

    def _no_look(self, error: BaseException) -> None:
        checks, state = self._judge.with_need("initial state", "coverage"), self._state
        why = f"could not judge: {type(error).__name__} when the model was looked at"
        self._judge.drop(checks, why, state.step, state.framework_step())

    def _alone(self, reason: str, facts: Facts) -> None:
        self._ledger.not_judged(reason, facts.step, facts.framework_step, self._judge.with_need("ranks"))


@contextmanager
def _attaching(session: ProbeSession) -> Iterator[None]:
    """What cannot be judged, and a release of torch or PEFT that looks different, is told once and ends no run."""
    try:
        yield
    except NotJudgedError as error:
        session.questions.append(str(error))
        session._ledger.not_judged(f"could not judge: {error}", 0, 0)
        session._teller.once(f"could not judge: {error}")
    except ValueError:
        raise  # what was asked cannot be meant
    except Exception as error:
        session._state.running = False
        session._errors.report(error)
        versions = environment()["versions"]
        session._ledger.not_judged(f"could not judge: {type(error).__name__} while attaching under {versions}", 0, 0)


class _LiveReport(ProbeReport):
    """The report of a run that goes on: what it holds is asked of the session when somebody reads it."""

    def __init__(self, session: ProbeSession) -> None:
        self._session = session
        teller = session._teller
        self.metrics, self.history, self.internal_errors = teller.metrics, teller.history, teller.errors.tracebacks

    @property
    def findings(self) -> list[Finding]:  # type: ignore[override]
        return self._session._ledger.findings

    @property
    def supervision(self) -> SupervisionReport | None:  # type: ignore[override]
        session = self._session
        seen = session._observers.reader.supervision if hasattr(session, "_observers") else None
        if seen is None or not seen.totals.steps:
            return None
        return SupervisionReport(seen.totals, seen.sample, session._state.tokenizer)

    @property
    def proofs(self) -> Mapping[Claim, Proof]:  # type: ignore[override]
        return self._session._proofs.proofs(ended=self._session._ended)

    @property
    def judged_steps(self) -> int:  # type: ignore[override]
        return self._session._teller.judged_steps

    @property
    def open_questions(self) -> list[str]:  # type: ignore[override]
        estimates = self._session._estimates
        return [*self._session.questions, *([] if estimates is None else estimates.questions)]
