"""LP305: the adapter is not reachable from an estimator's loss."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending
from lora_probe_callbacks.checks.estimator._estimators import each
from lora_probe_callbacks.facts import EstimatorFact, Facts


def judge(facts: Facts) -> Verdict:
    """Look for estimators whose loss gives the adapter no gradient."""
    return each(facts, _judge)


def _judge(facts: Facts, estimator: EstimatorFact) -> Verdict | None:
    if estimator.missing is None:
        return None
    wanted = facts.intended_slots if estimator.direction is None else estimator.direction & facts.intended_slots
    if wanted and wanted <= estimator.missing:
        return fail(
            f"the loss of estimator {estimator.name!r} gives the adapter no gradient: all {len(wanted)} are None",
            wanted,
            cause=estimator.name,
            got=f"{len(wanted)} of {len(wanted)} gradients None",
            expected="0",
        )
    if 0 < estimator.zero < PERSISTENT:
        return pending(
            f"its gradients were exactly zero in {estimator.zero} look(s): groups of equal responses are healthy"
        )
    if estimator.zero:
        return fail(
            f"the loss of estimator {estimator.name!r} gives the adapter gradients of exactly zero, {estimator.zero} times in a row",
            wanted,
            cause=estimator.name,
            got="every gradient exactly 0",
            expected="a gradient",
        )
    return ok()


CHECK = Check(
    code="LP305",
    name="no-gradient-from-estimator",
    what="The gradients of an estimator's loss with respect to the adapter are all None, or exactly zero four times in a row.",
    why="A checkpoint that drops the graph, a mask of zeros or a surrogate of detached parts gives an estimate of 0 with a small standard error.",
    fix="Compare the number of adapter tensors with a gradient from this loss and from the training loss, and look at its masks and coefficients.",
    quiet="Single E-batches without a signal; parts of the adapter that had no input.",
    explained_by=("LP101", "LP102", "LP103", "LP105", "LP106", "LP203", "LP204", "LP205", "LP304", "LP306"),
    judge=judge,
)
