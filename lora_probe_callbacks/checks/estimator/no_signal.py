"""LP903: an estimator cannot tell its signal from noise."""

from __future__ import annotations

import math

from lora_probe_callbacks.checks._base import Check, Verdict, ok, pending, warn
from lora_probe_callbacks.checks.estimator._estimators import each
from lora_probe_callbacks.checks.estimator.too_few_prompts import FEW
from lora_probe_callbacks.facts import EstimatorFact, Facts

LOOKS = 8
SURE = 2.0  # standard errors


def judge(facts: Facts) -> Verdict:
    """Look for estimates that are all noise, one by one and together."""
    return each(facts, _judge)


def _judge(facts: Facts, estimator: EstimatorFact) -> Verdict | None:
    if estimator.count is None or estimator.count < FEW:
        return None
    recent = estimator.recent
    # `sure` alone holds at all looks of a run together. The rest keeps this quiet in a run too short for it: of eight
    # looks at nothing, one is beyond two errors in every third run.
    if estimator.sure or any(abs(delta) > SURE * error for delta, error in recent):
        return ok()
    if len(recent) < LOOKS:
        return pending(
            f"{len(recent)} estimate(s) within {SURE:g} standard errors of 0, of {LOOKS} that are looked at together"
        )
    together, error = sum(d for d, _ in recent), math.sqrt(sum(e * e for _, e in recent))
    if abs(together) > SURE * error:
        return ok()
    tail = f"; at the last look {estimator.tail}, so that its error is a guess" if estimator.tail else ""
    return warn(
        f"the last {LOOKS} estimates of {estimator.name!r} cannot be told from 0, one by one or together",
        cause=estimator.name,
        got=f"delta_1 within {SURE:g} standard errors of 0 in {LOOKS} of {LOOKS}; their sum {together:+.2g}, with a standard error of "
        f"{error:.1g}{tail}",
        expected="a signal above the noise in some, or in their sum",
        fix="if no change is expected nothing is wrong; else take more prompts (the standard error falls with the root of their number) or look "
        "at the loss on which it is computed",
    )


CHECK = Check(
    code="LP903",
    name="no-signal",
    what="In eight estimates in a row delta_1 lies within two standard errors of zero, and so does their sum. It warns.",
    why="A number with an interval is logged each time, and looks like a measurement of something.",
    fix="Take more prompts, or conclude that these steps do not change what is estimated.",
    quiet="Estimates that are noisy one by one and have a sign together, in these eight or, surely, over the run.",
    explained_by=("LP305",),
    judge=judge,
)
