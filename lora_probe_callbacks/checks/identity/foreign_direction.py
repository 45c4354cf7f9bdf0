"""LP204: mu_Y was built on other tensors."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, some, warn
from lora_probe_callbacks.checks.estimator._estimators import each
from lora_probe_callbacks.facts import EstimatorFact, Facts, count, mask


def judge(facts: Facts) -> Verdict:
    """Compare the tensors of the update direction with those that are meant to train."""
    return each(facts, _judge)


def _judge(facts: Facts, estimator: EstimatorFact) -> Verdict | None:
    if estimator.direction is None:
        return None
    intended = count(facts.intended)
    mine = mask(estimator.direction, len(facts.slots)) & facts.intended
    if estimator.direction_foreign or not mine.any():
        foreign = some(estimator.direction_foreign) or "tensors that are no part of the adapter"
        return fail(
            f"the update direction of estimator {estimator.name!r} was built on other tensors than those that train: {foreign}",
            facts.intended,
            cause=estimator.name,
            got=f"{count(mine)} of {intended} adapter tensors, and {len(estimator.direction_foreign)} that the model does not hold",
            expected="tensors of the model that is trained, by object",
        )
    learning = facts.intended & facts.gradients.present
    left_out = learning & ~mine
    if left_out.any():
        return warn(
            f"the update direction of estimator {estimator.name!r} leaves out {count(left_out)} adapter tensors that the step moves: "
            f"{some(facts.slots.names(left_out))}",
            left_out,
            cause=estimator.name,
            got=f"{count(mine)} of {count(learning)} tensors with a gradient",
            expected="all of them, or a part on purpose",
            fix='if the direction is a part of the step on purpose, pass ignore=("LP204",); else build it from all of them',
        )
    return ok()


CHECK = Check(
    code="LP204",
    name="foreign-direction",
    what="The update direction mu_Y of an estimator was built on tensor objects that the trained model does not hold. It warns if it leaves out tensors "
    "that the step moves.",
    why="A copy, an old wrapper or a replaced adapter has tensors of the same names and shapes, so every inner product with them is a number that looks right.",
    fix="Build the direction, the optimizer and the estimator from one and the same module object, after all wrapping.",
    quiet="Directions given by name, which are taken for the tensors of that name.",
    explained_by=("LP202", "LP205"),
    judge=judge,
)
