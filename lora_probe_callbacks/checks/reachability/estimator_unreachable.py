"""LP304: the adapter is not reachable from an estimator's S."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, some, warn
from lora_probe_callbacks.checks.estimator._estimators import each
from lora_probe_callbacks.facts import EstimatorFact, Facts


def judge(facts: Facts) -> Verdict:
    """Look for estimators whose graph does not lead to the adapter."""
    return each(facts, _judge)


def _judge(facts: Facts, estimator: EstimatorFact) -> Verdict | None:
    if estimator.graph is None:
        return None
    if estimator.why_unknown:
        return pending(f"{estimator.why_unknown}; the gradients decide")
    reached = (estimator.reached or frozenset()) & facts.intended_slots
    if not reached:
        what = "carries no graph" if not estimator.graph else "has a graph that leads to none of the adapter's tensors"
        return fail(
            f"estimator {estimator.name!r} does not depend on the adapter: what it differentiates {what}",
            facts.intended,
            cause=estimator.name,
            got=f"0 of {len(facts.intended_slots)} adapter tensors in its graph",
            expected="all of them",
        )
    ran = {u for f in estimator.forwards if f.with_grad is not None for u in f.with_grad}
    wanted = facts.intended_slots if estimator.direction is None else estimator.direction & facts.intended_slots
    slots = facts.slots
    lost = sorted(i for i in wanted - reached if slots.unit[i] in ran and slots.requires_grad[i])
    if lost:
        return warn(
            f"estimator {estimator.name!r} does not depend on {len(lost)} adapter tensors whose layers ran in its forward: "
            f"{some(slots.names(lost))}",
            lost,
            cause=estimator.name,
            got=f"{len(reached)} of {len(wanted)} adapter tensors in its graph",
            expected="those of all layers that ran",
            fix="if a part is detached on purpose nothing is wrong; else look for detach() between these layers and what is differentiated",
        )
    return ok()


CHECK = Check(
    code="LP304",
    name="unreachable-from-estimator",
    what="The graph of what an estimator differentiates (S, or the losses made of it) does not lead to the adapter.",
    why="The training loss has its own graph, so training goes on. An estimate whose graph was cut is a constant, and its variance is a number all the same.",
    fix="Look for detach(), .data, numpy and no_grad between the forward and what is differentiated.",
    quiet="Graphs that cannot be walked (reentrant checkpointing); layers without an input; a frozen base, which nothing differentiates.",
    explained_by=("LP101", "LP102", "LP103", "LP105", "LP106", "LP203", "LP205", "LP306"),
    judge=judge,
)
