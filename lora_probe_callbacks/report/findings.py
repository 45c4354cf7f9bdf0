"""What a run is told: findings, and the error that carries them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_probe_callbacks.checks._base import Status

__all__ = ["Finding", "LoraProbeError", "LoraProbeWarning"]


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
