"""What a comparison came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_probe_callbacks.facts.serving import ServedFact, ServingVerdict
from lora_probe_callbacks.report.findings import Finding

__all__ = ["ServingReport", "ServingResult"]


@dataclass(frozen=True, slots=True)
class ServingResult:
    """One target.

    Attributes:
        target: What it is.
        fact: All that was measured; None where nothing could be.
        finding: What is wrong with it, if anything.
        error: Why it could not be compared.
    """

    target: str
    fact: ServedFact | None = None
    finding: Finding | None = None
    error: str = ""

    @property
    def verdict(self) -> ServingVerdict:
        """What its log-probs fit; ``"undecidable"`` if there are none."""
        return "undecidable" if self.fact is None else self.fact.verdict

    @property
    def slope(self) -> float:
        """The part of the live effect that it shows."""
        return float("nan") if self.fact is None else self.fact.slope

    @property
    def interval(self) -> tuple[float, float]:
        """Of the slope, 95%."""
        return (float("-inf"), float("inf")) if self.fact is None else (self.fact.low, self.fact.high)

    @property
    def correlation(self) -> float:
        """Between its effect and the live one."""
        return float("nan") if self.fact is None else self.fact.correlation

    @property
    def noise(self) -> float:
        """Root mean square of the difference of the bases, in nats a token."""
        return float("nan") if self.fact is None else self.fact.noise

    @property
    def exit_code(self) -> int:
        """0 served, 1 not, 2 not decided."""
        return {"served": 0, "undecidable": 2}.get(self.verdict, 1)

    def __str__(self) -> str:
        if self.fact is None:
            return f"{self.target}: could not compare: {self.error}"
        fact = self.fact
        line = (
            f"{self.target}: {self.verdict}. slope {fact.slope:.4f} in [{fact.low:.3f}, {fact.high:.3f}], correlation "
            f"{fact.correlation:.5f}, noise {fact.noise:.2g} against an effect of {fact.effect:.2g} nats a token "
            f"({fact.tokens} tokens)"
        )
        if self.finding is None:
            return line
        return f"{line}\n  {self.finding.code} {self.finding.message}\n  fix: {self.finding.fix}"


@dataclass(frozen=True, slots=True)
class ServingReport:
    """What several targets are, compared with the trained model.

    Attributes:
        results: One for each target, in their order.
        limits: What inference engines cannot hold of this adapter, in words.
        findings: What is wrong, the targets' and the limits'.
    """

    results: Sequence[ServingResult]
    limits: tuple[str, ...] = ()
    findings: Sequence[Finding] = field(default=())

    @property
    def exit_code(self) -> int:
        """0 if all are served, 1 if one is not, 2 if one could not be compared and none is wrong."""
        codes = {result.exit_code for result in self.results}
        return 1 if 1 in codes else 2 if 2 in codes or not codes else 0

    def __str__(self) -> str:
        lines = [f"cannot be held by every engine: {limit}" for limit in self.limits]
        return "\n".join([*lines, *map(str, self.results)])
