"""The findings of a run: one for each check and cause, with what changed since the last healthy step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_probe_callbacks.checks._base import Check, Verdict, skipped
from lora_probe_callbacks.facts import Facts, count
from lora_probe_callbacks.report.findings import Finding

__all__ = ["Ledger", "state_in_words"]

_RANK = {"fail": 0, "warn": 1, "pass": 2, "pending": 3, "skipped": 4}


class Ledger:
    """Keeps what the verdicts of all decisions come to.

    Args:
        checks: The checks that judge in this run.
    """

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = {check.code: check for check in checks}
        self._bad: dict[tuple[str, str], Finding] = {}  # by code and cause; stays when it no longer holds
        # by code: passed, pending or skipped, with step and framework step; a finding only when somebody asks
        self._others: dict[str, tuple[Verdict, int, int]] = {}
        self._listed: list[Finding] | None = None
        self.news = False  # since they were listed, more has changed than the steps up to which checks have passed
        self._baseline: dict[str, Any] | None = None
        # The last healthy decision, and that of an earlier step: put into words only when somebody asks.
        self._healthy: Facts | None = None
        self._earlier: Facts | None = None

    @property
    def baseline(self) -> dict[str, Any] | None:
        """The last healthy state, in words."""
        return self._baseline if self._healthy is None else state_in_words(self._healthy)

    @baseline.setter
    def baseline(self, state: dict[str, Any] | None) -> None:
        self._baseline, self._healthy, self._earlier = state, None, None

    def _baseline_before(self, step: int) -> dict[str, Any] | None:
        """The last healthy state of a step before this one; a step that fails is not its own last healthy one."""
        if self._healthy is None or self._healthy.step < step:
            return self.baseline
        return None if self._earlier is None or self._earlier.step >= step else state_in_words(self._earlier)

    @property
    def findings(self) -> list[Finding]:
        """Failures first; a check that failed is not listed as passed as well."""
        if self._listed is None:
            bad = {code for code, _ in self._bad}
            others = ((self._checks[code], *what) for code, what in self._others.items() if code not in bad)
            listed = [*self._bad.values(), *(self._finding(*other) for other in others)]
            self._listed, self.news = sorted(listed, key=lambda f: (_RANK[f.status], f.code)), False
        return self._listed

    @property
    def failing(self) -> bool:
        """Something fails, or has failed."""
        return any(finding.status == "fail" for finding in self._bad.values())

    def add(self, facts: Facts, verdicts: Mapping[str, Verdict]) -> list[Finding]:
        """Enter the verdicts of one decision.

        Args:
            facts: What they were judged on.
            verdicts: Code to verdict.

        Returns:
            The findings that are new, or that got worse.
        """
        changed = []
        self._listed = None
        for code, verdict in verdicts.items():
            if verdict.status in ("warn", "fail"):
                known = self._bad.get((code, verdict.cause))
                finding = self._finding_of_fault(self._checks[code], verdict, facts, known)
                if known is None or known.status != finding.status:
                    changed.append(finding)
                self._bad[code, verdict.cause] = finding
                self.news = True
            else:
                before = self._others[code][0] if code in self._others else None
                if not _replaces(verdict, before, end=facts.moment == "end"):
                    continue
                self.news = self.news or verdict is not before
                self._others[code] = verdict, facts.step, facts.framework_step
        if facts.moment == "end":
            self._close()
        healthy = not any(v.status == "fail" for v in verdicts.values())
        if healthy and any(f.received for f in facts.forwards):
            if self._healthy is not None and self._healthy.step < facts.step:
                self._earlier = self._healthy
            self._healthy = facts
        return changed

    def _close(self) -> None:
        """The run has ended: what had nothing to look at did not apply."""
        for code, (verdict, *when) in self._others.items():
            if verdict.status == "pending" and verdict.nothing_new:
                reason = f"not applicable: {verdict.message.removesuffix(' yet')}"
                self._others[code] = skipped(reason), when[0], when[1]

    def not_judged(self, reason: str, step: int, framework_step: int, checks: Sequence[Check] | None = None) -> None:
        """Say of checks that from here on they cannot be judged; what they passed before is no pass of the run.

        Args:
            reason: Why.
            step: The present step.
            framework_step: Its number in the framework.
            checks: Those concerned; default: all.
        """
        for check in self._checks.values() if checks is None else checks:
            known = self._others.get(check.code)
            passed = f" (passed up to step {known[1]})" if known is not None and known[0].status == "pass" else ""
            self._others[check.code] = Verdict("skipped", reason + passed), step, framework_step
        self._listed, self.news = None, True

    def _finding_of_fault(self, check: Check, verdict: Verdict, facts: Facts, known: Finding | None) -> Finding:
        step, framework_step = facts.step, facts.framework_step
        if verdict.of_update and facts.update is not None:
            step, framework_step = facts.update.step, facts.update.framework_step
        if verdict.seen is not None:
            step, framework_step = verdict.seen
        if known is None:
            baseline = self._baseline_before(step) if facts.units else None
            evidence = {**verdict.evidence, **_what_changed(baseline, state_in_words(facts), verdict)}
            return self._finding(check, verdict, step, framework_step, evidence=evidence)
        return self._finding(
            check,
            verdict,
            known.step,
            known.framework_step,
            evidence={**known.evidence, **verdict.evidence},
            last_step=step,
            count=known.count + 1,
            failed_before=known.status == "fail",
        )

    def _finding(
        self,
        check: Check,
        verdict: Verdict,
        step: int,
        framework_step: int,
        *,
        evidence: Mapping[str, object] | None = None,
        last_step: int | None = None,
        count: int = 1,
        failed_before: bool = False,
    ) -> Finding:
        bad = verdict.status in ("warn", "fail")
        return Finding(
            code=check.code,
            name=check.name,
            family=check.family,
            status="fail" if failed_before else verdict.status,
            message=verdict.message,
            evidence=evidence or {},
            fix=(verdict.fix or check.fix) if bad else "",
            step=step,
            framework_step=framework_step,
            last_step=step if last_step is None else last_step,
            count=count,
            cause=verdict.cause if bad else "",
        )


def state_in_words(facts: Facts) -> dict[str, Any]:
    """The few facts that tell what changed when a healthy run becomes unhealthy.

    Args:
        facts: What is known at a decision.

    Returns:
        Plain values by name.
    """
    forward = facts.training_forwards[0] if facts.training_forwards else None
    modes = forward.modes if forward is not None else facts.modes
    number = {mode: modes.count(mode) for mode in ("active", "inactive", "disabled", "merged")}
    read = facts.gradients.read
    return {
        "step": facts.step,
        "framework_step": facts.framework_step,
        "active_adapters": list(forward.active if forward is not None else facts.active),
        "adapted layers": {mode: n for mode, n in number.items() if n},
        "trainable tensors": count(facts.slots.requires_grad),
        "tensors in the optimizer": count(facts.slots.owned),
        "called module": forward.module if forward is not None else None,
        "gradients None": count(facts.gradients.missing) if read.any() else None,
    }


def _replaces(new: Verdict, old: Verdict | None, *, end: bool) -> bool:
    """One that judged is not overwritten by one that could not, nor a lasting reason by a passing one."""
    if old is None or new.status == "pass":
        return True
    if new.status == old.status == "pending":
        return not (new.nothing_new or end)  # what the steps left open says more
    return old.status in ("pending", new.status)


def _what_changed(baseline: Mapping[str, Any] | None, state: Mapping[str, Any], verdict: Verdict) -> dict[str, object]:
    if baseline is None:
        return {}
    changes = [
        f"{key} {baseline[key]!r} -> {state[key]!r}"
        for key in state
        if key not in ("step", "framework_step")
        and None not in (baseline.get(key), state[key])
        and baseline[key] != state[key]
    ]
    if not changes or verdict.of_update:
        return {"last healthy step": baseline["step"]} if not verdict.of_update else {}
    return {"last healthy step": baseline["step"], "changed since": "; ".join(changes)}
