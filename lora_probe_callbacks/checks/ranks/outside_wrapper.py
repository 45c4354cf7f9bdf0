"""LP703: adapter tensors that the wrapper does not manage."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped, some
from lora_probe_callbacks.checks.ranks._between_ranks import alone, explained, not_comparable, unmanaged
from lora_probe_callbacks.facts import Facts, count


def judge(facts: Facts) -> Verdict:
    """Look for adapter tensors beside the wrapper whose values or gradients differ between ranks."""
    ranks, wrapping = facts.ranks, facts.wrapping
    if ranks is None or wrapping is None:
        return alone(facts)
    if wrapping.kind is None:
        return skipped("no wrapper is known")
    if wrapping.kind == "DeepSpeed":
        return skipped(not_comparable(facts))
    if why_not := explained(ranks, "LP703"):
        return skipped(why_not)
    if not ranks.unmanaged:
        return ok()
    names = facts.slots.names(wrapping.unmanaged)
    who = f"{ranks.unmanaged} adapter tensors are not managed by {wrapping.kind}" + (
        f" ({some(names)})" if names else ""
    )
    if not unmanaged(facts):
        return pending(f"{who}; ranks have agreed so far")
    differ, of = (ranks.tensors_differ, "tensors") if ranks.tensors_differ else (ranks.gradients_differ, "gradients")
    a, b, apart = differ or (0, 0, 0.0)
    return fail(
        f"{who}: it was made before they were there or could train, nobody reduces their gradients, and every rank trains its own adapter",
        facts.intended,
        got=f"a sample of the {of} differs by {apart:.1%} of its norm between rank {a} and rank {b}",
        expected=f"all {count(facts.intended)} adapter tensors managed by {wrapping.kind}",
    )


CHECK = Check(
    code="LP703",
    name="outside-wrapper",
    what="Adapter tensors that the data-parallel wrapper does not manage, because they were added, activated or unfrozen after it was "
    "made, or stand as plain tensors beside the shards of fully_shard, and that differ between ranks, or whose gradients do.",
    why="DistributedDataParallel reduces what required gradients when it was made, fully_shard what was there. N ranks train N "
    "adapters, and rank 0's is saved.",
    fix="First attach, load and activate the adapter that should train, then make the wrapper (DistributedDataParallel, fully_shard, "
    "accelerator.prepare), then the optimizer.",
    quiet="Tensors left out on purpose and reduced by hand: as long as ranks agree, this stays pending.",
    threads=("huggingface/transformers#48792", "hao-ai-lab/FastVideo#1666", "huggingface/peft#899"),
    needs=("ranks",),
    judge=judge,
)
