"""What the checks on estimators share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from lora_probe_callbacks.checks._base import Verdict, absent, skipped, worst
from lora_probe_callbacks.facts import EstimatorFact, Facts, Gradients

__all__ = ["also_at_estimators", "at", "each"]


def also_at_estimators(judge: Callable[[Facts], Verdict]) -> Callable[[Facts], Verdict]:
    """Put the question that a check asks of the training forward to the forwards of estimators too.

    Args:
        judge: The check.

    Returns:
        A check that reports the training forward first.
    """

    def judge_both(facts: Facts) -> Verdict:
        verdict = judge(facts)
        if verdict.status in ("fail", "warn"):
            return verdict
        for estimator in facts.estimators:
            own = judge(_as_training(facts, estimator)) if estimator.forwards else verdict
            if own.status in ("fail", "warn"):
                message = f"at the forward of estimator {estimator.name!r}: {own.message}"
                cause = f"{estimator.name} {own.cause}".strip()
                return at(estimator, dataclasses.replace(own, message=message, cause=cause))
        return verdict

    return judge_both


def _as_training(facts: Facts, estimator: EstimatorFact) -> Facts:
    return dataclasses.replace(
        facts,
        forwards=tuple(dataclasses.replace(f, received=True) for f in estimator.forwards),
        modes=estimator.modes,
        active=estimator.active,
        gradients=Gradients.unread(len(facts.slots)),
        unobservable=None,
    )


def each(facts: Facts, judge: Callable[[Facts, EstimatorFact], Verdict | None]) -> Verdict:
    """The first estimator that something is wrong with; else the first that could be judged.

    Args:
        facts: What is known.
        judge: The verdict on one estimator, None where it has nothing to say of it.

    Returns:
        A verdict.
    """
    if not facts.estimators:
        return absent("no estimator was looked at yet")
    verdicts = []
    for estimator in facts.estimators:
        verdict = judge(facts, estimator)
        if verdict is None:
            verdict = skipped(estimator.why_not or "nothing of this kind was given")
        verdicts.append(at(estimator, verdict))
    return worst(verdicts)


def at(estimator: EstimatorFact, verdict: Verdict) -> Verdict:
    """A verdict on an estimator, with the step in which it was looked at."""
    return dataclasses.replace(verdict, seen=(estimator.step, estimator.framework_step))
