"""LP702: the gradients of the ranks are not reduced."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped, warn
from lora_probe_callbacks.checks.ranks._between_ranks import (
    alone,
    explained,
    not_comparable,
    reduction_is_missing,
    unmanaged,
)
from lora_probe_callbacks.facts import Facts, RanksFact, Wrapping


def judge(facts: Facts) -> Verdict:
    """Compare a sample of the gradients that every rank should hold after the reduction."""
    ranks, wrapping = facts.ranks, facts.wrapping
    if ranks is None or wrapping is None:
        return alone(facts)
    if why_not := not_comparable(facts) or explained(ranks, "LP702"):
        return skipped(why_not)
    if any(r.hook for r in ranks.reports):
        return skipped("a communication hook of DistributedDataParallel decides what is reduced, and when")
    if not ranks.stepping:
        return pending("no gradient was read on all ranks at this decision")
    differ = ranks.gradients_differ
    if differ is None:
        return ok()
    if unmanaged(facts):
        return skipped("explained by LP703")
    if not reduction_is_missing(facts):
        if ranks.tensors_differ is not None:
            return skipped("explained by LP701")
        return pending("gradients differ between ranks, and may still be reduced before the update")
    return _missing(facts, ranks, wrapping, differ)


def _missing(facts: Facts, ranks: RanksFact, wrapping: Wrapping, differ: tuple[int, int, float]) -> Verdict:
    a, b, apart = differ
    got = f"a sample of the gradients differs by {apart:.1%} of its norm between rank {a} and rank {b}"
    expected = "equal gradients on all ranks when the optimizer steps"
    if wrapping.kind is None:
        return warn(
            f"the gradients of rank {a} and rank {b} differ when the optimizer steps: nothing reduces them",
            facts.intended,
            got=got,
            expected=expected,
            fix="wrap the model in DistributedDataParallel and give the wrapper to the probe, or reduce the gradients before step(); "
            "if every rank is meant to train its own adapter, pass ignore=('LP7',)",
        )
    if ranks.bypassed:
        why = f"the loss was made on the module inside {wrapping.kind}, whose own forward never ran"
        fix = f"call the {wrapping.kind} itself, not its .module nor what unwrap_model() returns: only its forward prepares the reduction"
    elif ranks.unsynced:
        why = f"the last backward of the step ran inside no_sync() of {wrapping.kind}"
        fix = "leave no_sync() for the last micro-batch of every step: look at the flag that decides when gradients are accumulated"
    else:
        why = f"{wrapping.kind} did not reduce them"
        fix = ""
    return fail(
        f"the gradients of rank {a} and rank {b} differ when the optimizer steps: {why}",
        facts.intended,
        got=got,
        expected=expected,
        fix=fix,
    )


CHECK = Check(
    code="LP702",
    name="gradients-not-reduced",
    what="The gradients of an adapter tensor differ between ranks when the optimizer steps. It fails under a wrapper that should have "
    "reduced them, and warns if there is none.",
    why="Every rank steps on its own batches, its loss falls, and rank 0's adapter, trained on a part of the data, is the one saved.",
    fix="Call the wrapper, not the module inside it; leave no_sync() for the last micro-batch; build the wrapper around the adapter.",
    quiet="no_sync() while gradients are accumulated, reductions by hand before step(), equal batches on all ranks, shards, "
    "communication hooks, uneven inputs under Join.",
    threads=("huggingface/trl#7245", "kohya-ss/sd-scripts#989", "intel/e2eAIOK#197"),
    needs=("ranks",),
    judge=judge,
)
