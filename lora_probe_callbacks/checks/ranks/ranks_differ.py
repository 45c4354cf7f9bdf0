"""LP701: ranks hold different adapter tensors."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped, warn
from lora_probe_callbacks.checks.ranks._between_ranks import (
    alone,
    explained,
    not_comparable,
    reduction_is_missing,
    unmanaged,
)
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Compare a sample of the tensors of which every rank should hold the same copy."""
    ranks = facts.ranks
    if ranks is None or facts.wrapping is None:
        return alone(facts)
    if why_not := not_comparable(facts) or explained(ranks, "LP701"):
        return skipped(why_not)
    differ = ranks.tensors_differ
    if differ is None:
        return ok()
    if unmanaged(facts):
        return skipped("explained by LP703")
    if reduction_is_missing(facts):
        return skipped("explained by LP702")
    a, b, apart = differ
    message = f"rank {a} and rank {b} hold different adapter tensors"
    got = f"a sample of the tensors differs by {apart:.1%} of its norm between rank {a} and rank {b}"
    if facts.wrapping.kind is None and ranks.gradients_differ is not None:
        return warn(
            f"{message}, nothing reduces their gradients, and each rank trains its own adapter",
            facts.intended,
            got=got,
            expected="equal tensors, if the ranks are meant to train one adapter",
            fix="wrap the model in DistributedDataParallel (which also sends rank 0's tensors to all), or seed all ranks alike before "
            "the adapter is attached and reduce the gradients; if every rank is meant to train its own adapter, pass ignore=('LP7',)",
        )
    if facts.wrapping.kind is None and not ranks.stepping:
        return pending("tensors differ between ranks; whether their gradients are reduced is not seen at this decision")
    return fail(
        f"{message}{'' if ranks.equal_at_start else ', and did so from the start'}",
        facts.intended,
        got=got,
        expected="equal tensors: the ranks average one gradient",
    )


CHECK = Check(
    code="LP701",
    name="ranks-differ",
    what="Processes that should train one adapter hold different values of it: at the first decision, or at a later one. It fails if a "
    "wrapper keeps them together or their gradients are equal, and warns if nothing does.",
    why="Every rank's loss falls, rank 0's adapter is saved, and the gradients of the others were made for another one.",
    fix="Attach and initialise the adapter before the wrapper is made (DistributedDataParallel sends rank 0's tensors to all then), seed "
    "all ranks alike, and load or change adapter tensors on all ranks in the same way.",
    quiet="Shards, which differ by design; uneven inputs under Join; differences below a thousandth of the norm. Ranks that train "
    "separate adapters on purpose are warned of.",
    threads=("juzhengz/LoRI#8", "NVIDIA-NeMo/Megatron-Bridge#5843", "InfiniTensor/InfiniTrain#150"),
    needs=("ranks",),
    judge=judge,
)
