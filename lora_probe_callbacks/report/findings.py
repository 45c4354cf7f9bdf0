"""What a run is told: findings, the report that holds them, and the error that carries them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_probe_callbacks.checks._base import Status
from lora_probe_callbacks.report.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Finding", "LoraProbeError", "LoraProbeWarning", "ProbeReport"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was judged, or that could not be.

    Attributes:
        code: Code of the check, for instance ``"LP103"``.
        name: Its readable name.
        family: Its family.
        status: ``pass``, ``warn``, ``fail``, ``pending`` or ``skipped``.
        message: What is wrong, or why it was not judged.
        evidence: What was got, what was expected, and what changed since the last healthy step.
        fix: What to do.
        step: First step of this session in which it was observed, from 0.
        framework_step: The framework's own number of that step.
        last_step: Last step in which it was observed.
        count: Number of decisions that found it.
        cause: Tells apart findings of one check with different causes.
    """

    code: str
    name: str
    family: str
    status: Status
    message: str
    evidence: Mapping[str, object]
    fix: str
    step: int
    framework_step: int
    last_step: int
    count: int = 1
    cause: str = ""

    def __str__(self) -> str:
        lines = [f"{self.code} {self.name} (step {self.step}): {self.message}"]
        lines += [f"  {key}: {value}" for key, value in self.evidence.items()]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


@dataclass(slots=True)
class ProbeReport:
    """What a session has found so far.

    Attributes:
        findings: One for each (check, cause): failures and warnings first, then what passed, then
            what was not judged.
        metrics: The latest value of every metric.
        history: The metrics of the probed steps.
        judged_steps: Probed steps that were judged; without one nothing is called healthy.
        internal_errors: Tracebacks of errors inside the probe itself, each kept once.
    """

    findings: list[Finding] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    internal_errors: list[str] = field(default_factory=list)
    judged_steps: int = 0
    history: History = field(default_factory=History, repr=False)

    def with_status(self, *statuses: Status) -> list[Finding]:
        """The findings with one of these statuses."""
        return [f for f in self.findings if f.status in statuses]

    @property
    def failures(self) -> list[Finding]:
        """The findings that fail, root cause first."""
        return self.with_status("fail")

    @property
    def healthy(self) -> bool | None:
        """True if a step was judged and nothing failed, False if something failed, None if no step was judged."""
        if self.failures:
            return False
        return True if self.judged_steps and self.with_status("pass", "warn") else None

    @property
    def exit_code(self) -> int:
        """0 healthy, 1 unhealthy, 2 could not judge."""
        return {True: 0, False: 1, None: 2}[self.healthy]

    def plot(self) -> Figure:
        """Draw gradient norms, updates and findings over the probed steps; needs matplotlib.

        Returns:
            The figure; a notebook shows it.
        """
        from lora_probe_callbacks.report.plots import plot

        return plot(self)

    def __str__(self) -> str:
        from lora_probe_callbacks.report.console import render

        return render(self)

    def __rich__(self) -> object:
        from lora_probe_callbacks.report.console import health_table

        return health_table(self)


class LoraProbeError(Exception):
    """The adapter does not train. Not a RuntimeError: training loops catch those as out of memory.

    Args:
        findings: The findings that fail, root cause first.
    """

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = list(findings)
        super().__init__("\n" + "\n".join(map(str, self.findings)))


class LoraProbeWarning(UserWarning):
    """A finding under ``on_failure="warn"``, or one that is only likely."""
