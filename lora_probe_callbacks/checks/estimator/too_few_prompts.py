"""LP902: an estimate rests on too few prompts."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, ok, warn
from lora_probe_callbacks.checks.estimator._estimators import each
from lora_probe_callbacks.facts import EstimatorFact, Facts

FEW = 4
_T = {2: 12.7, 3: 4.3}  # Student's t at 95%, in standard errors, by the number of prompts


def judge(facts: Facts) -> Verdict:
    """Look for estimates whose variance is that of two or three numbers."""
    return each(facts, _judge)


def _judge(facts: Facts, estimator: EstimatorFact) -> Verdict | None:
    count = estimator.count
    if count is None:
        return None
    if count >= FEW:
        return ok()
    return warn(
        f"estimator {estimator.name!r} rests on {count} prompts: its interval at 95% is {_T.get(count, 12.7)} standard errors to each side",
        cause=estimator.name,
        got=f"{count} prompts in an E-batch",
        expected=f"{FEW} at least, better 8 or more",
        fix="give it larger batches; with 8 prompts the interval is 2.4 standard errors to each side",
    )


CHECK = Check(
    code="LP902",
    name="too-few-prompts",
    what="An E-batch holds two or three prompts, between which the variance is taken. It warns.",
    why="The standard error of two numbers is off by a factor of two or more in four of ten cases, and it is logged like any other.",
    fix="Take more prompts for each estimate.",
    quiet="Four prompts and more. A single prompt has no variance: that estimate is skipped with its reason.",
    judge=judge,
)
