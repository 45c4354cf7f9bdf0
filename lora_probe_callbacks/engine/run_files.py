"""The files of one run: what a user and a framework ask about saves and resumes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lora_probe_callbacks.engine.collector import Collector
from lora_probe_callbacks.engine.decision import Decisions, Judge
from lora_probe_callbacks.engine.findings import Ledger
from lora_probe_callbacks.engine.proofs import ProofBook, claims_of
from lora_probe_callbacks.engine.run_state import RunState
from lora_probe_callbacks.engine.saves import Checkpoints
from lora_probe_callbacks.engine.telling import Teller
from lora_probe_callbacks.facts import SavedFact
from lora_probe_callbacks.observe.checkpoint.fingerprint import without_optimizer
from lora_probe_callbacks.observe.model.targets import Targets
from lora_probe_callbacks.report.report import ProbeReport

__all__ = ["RunFiles"]


class RunFiles:
    """Reads files back, and remembers what was saved.

    Args:
        state: Where the run is.
        judge: Asks the checks.
        ledger: Keeps the findings of the run.
        proofs: Keeps its proofs.
        decisions: Judges files outside a decision.
        teller: Tells the user.
        reads: This process reads files.
    """

    def __init__(
        self,
        state: RunState,
        judge: Judge,
        ledger: Ledger,
        proofs: ProofBook,
        decisions: Decisions,
        teller: Teller,
        *,
        reads: bool,
    ) -> None:
        self._state = state
        self._judge = judge
        self._ledger = ledger
        self._proofs = proofs
        self._decisions = decisions
        self._teller = teller
        self._errors = teller.errors
        self._reads = reads
        self._restored: tuple[Mapping[str, Any], str, bool] | None = None  # before the start
        self._collector: Collector | None = None
        self._errors.on("files", self._give_up)

    def begin(self, targets: Targets, collector: Collector) -> None:
        """Watch the files of what is expected now.

        Args:
            targets: What is expected to train.
            collector: Is given what there is to compare.
        """
        self._collector = collector
        if not self._judge.with_need("files", "resume"):
            return
        with self._errors.contain("files"):
            collector.checkpoints = Checkpoints(targets, reads=self._reads, frozen_state=collector.frozen_state)
            if self._restored is not None:
                state, source, whole = self._restored
                collector.checkpoints.restored(state, source, whole=whole)

    @property
    def _checkpoints(self) -> Checkpoints | None:
        return None if self._collector is None else self._collector.checkpoints

    @property
    def _present_step(self) -> int:
        """At the end of a run, the step that would come next has not begun."""
        return self._collector.step_of("end") if self._collector is not None else 0

    def _give_up(self, error: BaseException) -> None:
        if self._collector is not None:
            self._collector.checkpoints = None
        checks = self._judge.with_need("files", "resume")
        reason = f"could not judge: {type(error).__name__} while a checkpoint was looked at: {error}"
        self._ledger.not_judged(reason, self._state.step, self._state.framework_step(), checks)

    # --- what a later run should know -------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a later session should know: the last healthy state, and a fingerprint of what is trained now."""
        state: dict[str, Any] = {"baseline": self._ledger.baseline}
        if self._checkpoints is not None:
            with self._errors.contain("files"):
                state["fingerprint"] = self._checkpoints.state()
        return state

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        *,
        source: str = "the checkpoint",
        whole: bool = False,
        optimizer_saved: bool = True,
    ) -> None:
        """Take over what an earlier session knew; the next decision compares its fingerprint with what is here.

        Args:
            state: What :meth:`state_dict` returned.
            source: Where it comes from, for messages.
            whole: The adapter and the optimizer are restored from the same place, by a framework.
            optimizer_saved: Else the optimizer was left out by intent: it begins anew.
        """
        self._ledger.baseline = state.get("baseline")
        saved = state.get("fingerprint")
        if saved is None:
            return
        saved = saved if optimizer_saved else without_optimizer(saved)
        self._restored = (saved, source, whole)
        if self._checkpoints is not None:
            self._checkpoints.restored(saved, source, whole=whole)

    def restored_from(self, path: str | os.PathLike[str]) -> None:
        """The run goes on from a checkpoint that holds no state of this probe: the adapter should be its own.

        Args:
            path: The checkpoint.
        """
        if self._checkpoints is not None and self._reads and os.path.exists(path):
            with self._errors.contain("files"):
                self._checkpoints.check(path, self._state.step, self._state.framework_step(), running=True)

    def take_as_whole(self) -> None:
        """The framework's checkpoints hold whole modules, with everything that training moves in them."""
        self._state.saves_whole = True

    # --- saves ------------------------------------------------------------------------------

    def announced(self, path: str | os.PathLike[str]) -> None:
        """A framework writes a checkpoint: the adapter is sampled now, and the file read at the next event.

        Args:
            path: The file or folder.
        """
        if self._checkpoints is not None and not self._state.broken:
            with self._errors.contain("files"):
                self._checkpoints.announced(path, self._present_step, self._state.framework_step())

    def written(self) -> None:
        """What was announced is complete: read it. After the end of the run it is judged at once."""
        checkpoints = self._checkpoints
        if checkpoints is None or self._state.broken:
            return
        found: list[SavedFact] = []
        with self._errors.contain("files"):
            if self._state.running:
                checkpoints.look()
            else:
                found.extend(checkpoints.take(end=True))
        self._show(found)

    def _show(self, found: Sequence[SavedFact]) -> None:
        if found:
            for finding in self._decisions.on_files(found, self._ledger)[1]:
                self._teller.finding(finding)

    def check(self, path: str | os.PathLike[str]) -> ProbeReport:
        """Read a saved file back and compare every element with the adapter; see :class:`Checkpoints`.

        While training goes on, what fails is acted upon by the next decision as well. Nothing is raised here.

        Args:
            path: A folder or file of an adapter, or a checkpoint of the whole module.

        Returns:
            What was found in this file.
        """
        checks, state = self._judge.with_need("files"), self._state
        ledger, proofs = Ledger(checks), ProofBook(claims_of(checks))
        found: list[SavedFact] = []
        if self._checkpoints is not None and not state.broken:
            with self._errors.contain("files"):
                found += self._checkpoints.check(
                    path, self._present_step, state.framework_step(), running=state.running, asked=True
                )
        if found:
            self._decisions.on_files(found, ledger)
            proofs.of_file(self._proofs, found)
            if not state.running:
                self._show(found)
        else:
            ledger.not_judged("could not judge: the probe has not begun, or has stepped aside", state.step, state.step)
        return ProbeReport(findings=ledger.findings, proofs=proofs.proofs(ended=True), judged_steps=1)
