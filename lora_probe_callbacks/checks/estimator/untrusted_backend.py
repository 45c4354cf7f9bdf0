"""LP901: the estimator's backend is not to be trusted."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, ok, warn
from lora_probe_callbacks.checks.estimator._estimators import each
from lora_probe_callbacks.facts import EstimatorFact, Facts


def judge(facts: Facts) -> Verdict:
    """Look for estimators whose projection failed its comparison with an ordinary backward."""
    return each(facts, _judge)


def _judge(facts: Facts, estimator: EstimatorFact) -> Verdict | None:
    if estimator.untrusted is None:
        return None if estimator.count is None else ok()
    return warn(
        f"nothing was logged of estimator {estimator.name!r}: {estimator.untrusted}",
        facts.intended,
        cause=estimator.name,
        got="a projection that fails its comparison with an ordinary backward",
        expected="agreement within rounding",
        fix="pass example_of_row= if the rows of a batch are not its prompts, make the loss a function of the model and the batch alone, or pass "
        'backend="loop", one backward for each prompt',
    )


CHECK = Check(
    code="LP901",
    name="untrusted-backend",
    what="At the first use of a model, loss and batch shape the projection of an estimator is compared with one ordinary backward, and disagrees. It warns, and "
    "no number is logged.",
    why="Rows that are not prompts (sequence-first tensors, gathered tokens, losses over pairs) give numbers of the right size that belong to no prompt, so "
    "their variance is wrong while their sum may be right.",
    fix='Say which prompt each row belongs to (example_of_row=), or use backend="loop".',
    quiet="Disagreements within the rounding of the lowest precision in the forward; models that are refused by name (batch norm in train mode) are skipped.",
    explained_by=("LP101", "LP102", "LP103", "LP105", "LP106", "LP205", "LP304", "LP306"),
    judge=judge,
)
