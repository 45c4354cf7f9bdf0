"""The report of a run: what was proven, what was found, and what could not be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lora_probe_callbacks.checks._base import Status
from lora_probe_callbacks.facts import Claim, Proof
from lora_probe_callbacks.report.console import details, plain_text, summary
from lora_probe_callbacks.report.findings import Finding
from lora_probe_callbacks.report.history import History
from lora_probe_callbacks.report.supervision import SupervisionReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ProbeReport"]


@dataclass
class ProbeReport:
    """What a session has proven and found so far.

    Attributes:
        findings: One for each (check, cause): failures and warnings first, then what passed, then
            what was not judged.
        proofs: Claim to the tensors for which it is proven; the claims that apply to this run.
        metrics: The latest value of every metric.
        history: The metrics of the probed steps.
        judged_steps: Probed steps that were judged; without one nothing is called healthy.
        internal_errors: Tracebacks of errors inside the probe itself, each kept once.
        open_questions: What else keeps this run from being called healthy: an estimator that could not be computed,
            a record that ends in the middle.
        supervision: The tokens that the loss is made of; None where they could not be seen.
    """

    findings: list[Finding] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    internal_errors: list[str] = field(default_factory=list)
    judged_steps: int = 0
    history: History = field(default_factory=History, repr=False)
    proofs: Mapping[Claim, Proof] = field(default_factory=dict)
    open_questions: list[str] = field(default_factory=list)
    supervision: SupervisionReport | None = field(default=None, repr=False)

    def with_status(self, *statuses: Status) -> list[Finding]:
        """The findings with one of these statuses."""
        return [f for f in self.findings if f.status in statuses]

    @property
    def failures(self) -> list[Finding]:
        """The findings that fail, root cause first."""
        return self.with_status("fail")

    @property
    def status(self) -> Literal["healthy", "unhealthy", "unproven"]:
        """Whether the adapter trains.

        ``"unhealthy"`` if a check failed; ``"healthy"`` if every claim that applies is proven for every tensor for
        which it should be, and nothing went wrong on the way; else ``"unproven"``, and :meth:`why_unproven` says why.
        """
        if self.failures:
            return "unhealthy"
        return "unproven" if self.why_unproven() else "healthy"

    def why_unproven(self) -> list[str]:
        """What keeps the run from being called healthy, apart from checks that failed."""
        if self.internal_errors:
            last = self.internal_errors[-1].strip().splitlines()[-1]
            return [f"the probe could not judge: {last}", *self.open_questions]
        if not self.judged_steps or not self.with_status("pass", "warn", "fail"):
            return self.open_questions or ["no step was judged"]
        if not self.proofs and not self.open_questions:
            return ["the checks that were selected prove nothing about training (select, ignore)"]
        gaps = [
            f"{p.claim}: " + (f"{p.expected - p.proven} of {p.expected} tensors, {p.why}" if p.expected else p.why)
            for p in self.proofs.values()
            if not p.complete and not p.sampled
        ]
        return gaps + self.open_questions

    @property
    def healthy(self) -> bool | None:
        """True if the run is proven healthy, False if a check failed, None if it is unproven."""
        return {"healthy": True, "unhealthy": False, "unproven": None}[self.status]

    @property
    def exit_code(self) -> int:
        """0 healthy, 1 unhealthy, 2 unproven."""
        return {"healthy": 0, "unhealthy": 1, "unproven": 2}[self.status]

    @property
    def details(self) -> str:
        """Everything that was proven, judged and not judged, as a text of one line for each check."""
        return plain_text(details(self))

    def plot(self) -> Figure:
        """Draw gradient norms, updates and findings over the probed steps; needs matplotlib.

        Returns:
            The figure; a notebook shows it.
        """
        from lora_probe_callbacks.report.plots import plot

        return plot(self)

    def __str__(self) -> str:
        return plain_text(summary(self))

    def __rich__(self) -> object:
        return summary(self)
