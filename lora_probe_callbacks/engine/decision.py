"""One decision: from facts to verdicts, findings and proofs, and to what is done about them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from lora_probe_callbacks._gc import no_collection
from lora_probe_callbacks.checks._base import Check, Need, Verdict, skipped
from lora_probe_callbacks.checks._catalogue import explain
from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.distributed.consensus import Agreement
from lora_probe_callbacks.engine.collector import Collector
from lora_probe_callbacks.engine.errors import Errors
from lora_probe_callbacks.engine.findings import Ledger, state_in_words
from lora_probe_callbacks.engine.proofs import ProofBook
from lora_probe_callbacks.engine.run_state import RunState
from lora_probe_callbacks.engine.telling import Teller
from lora_probe_callbacks.facts import Facts, FileFacts, Moment, SavedFact, When
from lora_probe_callbacks.report.findings import Finding, LoraProbeError, LoraProbeWarning
from lora_probe_callbacks.report.metrics import metrics_of_estimators, metrics_of_step, metrics_of_update

__all__ = ["Decisions", "Judge"]


class Judge:
    """Asks the checks. A check that raises is left out from then on, and the rest goes on.

    Args:
        checks: Those that were selected.
        errors: Errors of our own.
        ledger: Where it is said that a check cannot be judged any more.
    """

    def __init__(self, checks: Iterable[Check], errors: Errors, ledger: Ledger) -> None:
        self.checks = list(checks)
        self._errors = errors
        self._ledger = ledger

    def with_need(self, *needs: Need) -> list[Check]:
        """The checks that cannot do without one of these."""
        return [check for check in self.checks if set(needs) & set(check.needs)]

    def drop(self, checks: Sequence[Check], reason: str, step: int, framework_step: int) -> None:
        """Leave checks out from here on, and say why."""
        self.checks = [check for check in self.checks if check not in checks]
        self._ledger.not_judged(reason, step, framework_step, checks)

    def verdicts(self, facts: Facts, checks: Iterable[Check] | None = None) -> dict[str, Verdict]:
        """What the checks say, consequences left out.

        Args:
            facts: What to judge.
            checks: Those to ask; default: all.

        Returns:
            Code to verdict.
        """
        found: dict[str, Verdict] = {}
        for check in list(self.checks if checks is None else checks):
            try:
                if facts.why_not_owned and "owned" in check.needs:
                    found[check.code] = skipped(facts.why_not_owned)
                else:
                    found[check.code] = check.judge(facts)
            except Exception as error:
                self._errors.report(error, "check")
                reason = f"could not judge: {type(error).__name__} inside the check"
                self.drop([check], reason, facts.step, facts.framework_step)
        return explain(found)


class Decisions:
    """Decides, tells and acts.

    Args:
        config: What was meant.
        judge: Asks the checks.
        ledger: Keeps the findings.
        proofs: Keeps the proofs.
        teller: Tells the user, the loggers and the record.
        agreement: The other ranks.
        errors: Errors of our own.
        on_stop: Called once when something fails under ``on_failure="stop"``.
    """

    def __init__(
        self,
        config: ProbeConfig,
        judge: Judge,
        ledger: Ledger,
        proofs: ProofBook,
        teller: Teller,
        agreement: Agreement,
        errors: Errors,
        on_stop: Callable[[], None] | None,
    ) -> None:
        self._config = config
        self._judge = judge
        self._ledger = ledger
        self._proofs = proofs
        self._teller = teller
        self._agreement = agreement
        self._errors = errors
        self._on_stop = on_stop
        self.should_stop = False
        self.error: LoraProbeError | None = None

    def begin(self, state: RunState, collector: Collector, release: Callable[[], None]) -> None:
        """A run begins.

        Args:
            state: Where it is.
            collector: Makes its facts.
            release: Called before the run is ended by an error: hooks and tensors go, for nobody may tell us that the
                loop is left.
        """
        self._state = state
        self._collector = collector
        self._release = release

    # --- deciding ---------------------------------------------------------------------------

    def decide_ownership(self) -> None:
        """Before the first forward: does an optimizer own anything of the adapter at all?

        Raises:
            LoraProbeError: If none does, and ``on_failure`` is ``"raise"``.
        """
        early = [check for check in self._judge.checks if check.early]
        if early and not self._state.broken:
            self.decide("start", None, 0, probed=False, only=early)

    def decide(
        self,
        moment: Moment,
        optimizer: int | None,
        step: int,
        *,
        probed: bool,
        final: bool = False,
        only: Sequence[Check] | None = None,
    ) -> None:
        """Judge everything observed up to now, once; tell it, and act on it.

        Args:
            moment: What the decision is made for.
            optimizer: Whose event it is.
            step: The step being decided.
            probed: It is a probed one.
            final: Nothing can change its gradients before the update.
            only: The checks to ask; default: all.

        Raises:
            LoraProbeError: If something fails and ``on_failure`` is ``"raise"``.
        """
        together, state = self._agreement.several, self._state
        if state.broken and not together:
            return
        began = time.perf_counter()
        with no_collection():  # up to where the facts of the last decision are let go
            facts, verdicts = self._look(moment, optimizer, step, probed=probed, final=final, only=only)
            if together:
                between = partial(self._judge.verdicts, checks=self._judge.with_need("ranks"))
                facts, verdicts = self._agreement.decide(facts, verdicts, broken=state.broken, judge=between)
            changed: list[Finding] = []
            with self._errors.contain():
                changed = self._ledger.add(facts, verdicts)
                if not state.broken:
                    self._proofs.enter(facts, verdicts)
        if not state.broken:
            self._teller.overhead_ms += (time.perf_counter() - began) * 1e3
            self._emit(facts, probed=probed)
            self._teller.decision(facts, _told(facts, verdicts, probed=probed), changed, state_in_words)
        self.act(verdicts, changed, moment)

    def _look(
        self,
        moment: Moment,
        optimizer: int | None,
        step: int,
        *,
        probed: bool,
        final: bool,
        only: Sequence[Check] | None,
    ) -> tuple[Facts, dict[str, Verdict]]:
        """The facts and verdicts of this rank; nothing at all if its probe is broken."""
        state = self._state
        if not state.broken:
            with self._errors.contain():
                facts = self._collector.collect(moment, optimizer, step, probed=probed, final=final)
                return facts, self._judge.verdicts(facts, only)
        return Facts.of(When(moment, optimizer, step, state.framework_step())), {}

    def _emit(self, facts: Facts, *, probed: bool) -> None:
        """Metrics of an update belong to its own step, which lies behind the one being decided."""
        teller = self._teller
        if facts.update is not None:
            teller.row(metrics_of_update(facts), facts.update.framework_step)
        for framework_step, reached in metrics_of_estimators(facts).items():
            teller.row(reached, framework_step)
        if facts.moment not in ("step", "skipped") or not probed:
            return
        teller.judged_steps += 1
        row = metrics_of_step(facts)
        row |= {f"lora_probe/proven/{claim}": fraction for claim, fraction in self._proofs.fractions().items()}
        row["lora_probe/healthy"] = float(not self._ledger.failing)
        row["lora_probe/overhead_ms"] = teller.overhead_ms
        teller.row(row, facts.framework_step)
        teller.overhead_ms = 0.0

    # --- files ------------------------------------------------------------------------------

    def on_files(self, found: Sequence[SavedFact], ledger: Ledger) -> tuple[dict[str, Verdict], list[Finding]]:
        """The verdicts on saved files alone, outside a decision.

        Args:
            found: How each compares with the live adapter.
            ledger: Where they are entered: that of the run, or one of a look by hand.

        Returns:
            Code to verdict, and the findings that are new.
        """
        first = found[0]
        facts = Facts.of(When("step", None, first.step, first.framework_step), FileFacts(tuple(found)))
        every = self._judge.verdicts(facts, self._judge.with_need("files"))
        verdicts = {code: v for code, v in every.items() if v.status != "pending"}
        changed = ledger.add(facts, verdicts)
        if ledger is self._ledger:
            self._proofs.enter_saves(found)
            if changed and self._state.running:
                self._teller.decision(facts, verdicts, changed, state_in_words)
        return verdicts, changed

    def decide_on_files(self, found: Sequence[SavedFact]) -> None:
        """Between two probed steps nothing but a file may wait: the rest is not looked at for that."""
        if found:
            self.act(*self.on_files(found, self._ledger), "step")

    # --- acting -----------------------------------------------------------------------------

    def act(self, verdicts: Mapping[str, Verdict], changed: Sequence[Finding], moment: Moment) -> None:
        """Tell what is new, and stop the run where that is wanted.

        Args:
            verdicts: Code to verdict.
            changed: The findings that are new or got worse.
            moment: What the decision was made for.

        Raises:
            LoraProbeError: If something fails and ``on_failure`` is ``"raise"``.
        """
        codes = {code for code, verdict in verdicts.items() if verdict.status == "fail"}
        failing = [f for f in self._ledger.findings if f.status == "fail" and f.code in codes] if codes else []
        raising = bool(failing) and self._config.on_failure == "raise" and moment != "exception"
        for finding in changed:
            if not (raising and finding.status == "fail"):
                self._teller.finding(finding)
            if self._config.on_failure == "warn" and finding.status == "fail" and moment != "exception":
                warnings.warn(str(finding), LoraProbeWarning, stacklevel=2)
        if failing and self._config.on_failure == "stop" and not self.should_stop:
            self.should_stop = True
            if self._on_stop is not None:
                self._on_stop()
        if raising:
            self._release()
            self.error = LoraProbeError(failing)
            raise self.error

    def raise_again(self) -> None:
        """Somebody swallowed our error: the adapter still does not train.

        Raises:
            LoraProbeError: If one was raised before.
        """
        if self.error is not None:
            raise LoraProbeError(self.error.findings)

    def note_on(self, error: BaseException, step: int) -> None:
        """Judge the facts at hand and put what fails on the user's own exception; another rank may know why.

        Args:
            error: The exception.
            step: The present step.
        """
        known = {(f.code, f.cause) for f in self._ledger.findings if f.status == "fail"}
        self.decide("exception", None, step, probed=False)
        for finding in self._ledger.findings:
            if finding.status == "fail" and (finding.code, finding.cause) not in known:
                error.add_note(f"lora_probe: {finding}")


def _told(facts: Facts, verdicts: Mapping[str, Verdict], *, probed: bool) -> Mapping[str, Verdict]:
    """For the record: of a step that is not probed, only what waited to be judged; nothing else was looked at."""
    if facts.moment == "step" and not probed:
        return {code: v for code, v in verdicts.items() if v.status != "pending"}
    return verdicts
