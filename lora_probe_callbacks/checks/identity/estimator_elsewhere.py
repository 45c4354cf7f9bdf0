"""LP205: the estimator runs on another module."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, some
from lora_probe_callbacks.checks.estimator._estimators import each
from lora_probe_callbacks.facts import EstimatorFact, Facts


def judge(facts: Facts) -> Verdict:
    """Look for estimators that lead to parameters of another model, and to none of the adapter."""
    return each(facts, _judge)


def _judge(facts: Facts, estimator: EstimatorFact) -> Verdict | None:
    name = estimator.name
    if estimator.reached and estimator.reached & facts.intended_slots:
        return ok()
    expected = f"the {len(facts.intended_slots)} adapter tensors of the model that is trained"
    if estimator.foreign and not any(f.holds_expected for f in estimator.forwards):
        return fail(
            f"estimator {name!r} runs on another module: it leads to {estimator.foreign} parameters that the trained model does not hold, "
            "and to none of its adapter",
            facts.intended,
            cause=name,
            got=f"{estimator.foreign} parameters of another module",
            expected=expected,
        )
    # A forward of this step that the training loss did not use may have been detached: LP304.
    spare = any(f.holds_expected and f.carries_graph and not f.received for f in facts.forwards)
    if estimator.elsewhere and (estimator.graph or not spare):
        what = "leads to no parameter" if estimator.graph else "carries no graph"
        return fail(
            f"estimator {name!r} {what}, and no forward of the trained model made it: it runs on another module, or was cut off from a forward "
            "by detach()",
            facts.intended,
            cause=name,
            got=some(estimator.elsewhere),
            expected=expected,
        )
    if estimator.graph is None or estimator.why_unknown:
        return None
    return ok()


CHECK = Check(
    code="LP205",
    name="estimator-elsewhere",
    what="What an estimator differentiates was made by another module object than the one that is trained.",
    why="A wrapper's .module, a copy or the model from before the adapter gives log-probs that look right. The update direction lives on the tensors "
    "of the trained module, so the estimate is of something else, or exactly zero.",
    fix="Compute S through the very module whose parameters the optimizer owns.",
    quiet="The base model inside a PeftModel, where LoRA is injected in place; estimators that reach both the adapter and other modules.",
    explained_by=("LP202",),
    judge=judge,
)
