"""LP306: the estimator's forward runs under no_grad or inference_mode."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok
from lora_probe_callbacks.checks.estimator._estimators import each
from lora_probe_callbacks.facts import EstimatorFact, Facts


def judge(facts: Facts) -> Verdict:
    """Look for estimators without a graph whose forward was called without gradients."""
    return each(facts, _judge)


def _judge(facts: Facts, estimator: EstimatorFact) -> Verdict | None:
    if estimator.graph is None:
        return None
    calls = estimator.without_grad
    if estimator.graph or any(f.with_grad for f in estimator.forwards) or not (calls or estimator.inference):
        return ok()
    mode = "inference_mode" if estimator.inference else "no_grad"
    return fail(
        f"the forward of estimator {estimator.name!r} ran under {mode}: what it differentiates carries no graph",
        facts.intended,
        cause=estimator.name,
        got=f"{calls} call(s) of the model without gradients",
        expected="a forward with gradients enabled",
        fix=""
        if mode == "no_grad"
        else "inference_mode cannot be undone inside, and its tensors never carry a graph: leave it for the estimator",
    )


CHECK = Check(
    code="LP306",
    name="estimator-without-grad",
    what="What an estimator differentiates carries no graph, and the forward that made it was called under no_grad or inference_mode.",
    why="Sampling and evaluation code is decorated with no_grad; an estimator that is called from there differentiates a constant.",
    fix="Call it under torch.enable_grad(), outside evaluation hooks.",
    quiet="Calls without gradients beside an estimator that carries a graph.",
    explained_by=("LP205",),
    judge=judge,
)
