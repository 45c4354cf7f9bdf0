"""LP103: the adapter is merged into the base weight in the forward that trains."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, some
from lora_probe_callbacks.checks.estimator._estimators import also_at_estimators
from lora_probe_callbacks.facts import Facts, count


def judge(facts: Facts) -> Verdict:
    """Look for adapters that are merged in a training forward, or whose layers are gone."""
    if facts.unloaded:
        return fail(
            f"{some(facts.unloaded)} is a PeftModel without a single adapter tensor: its adapters were "
            "unloaded, or merged and unloaded, and nothing is left to train",
            cause="unloaded",
            got="0 adapter tensors",
            expected="the adapter that should train",
            fix="train first and call merge_and_unload() at the very end, or wrap the merged model anew "
            "with get_peft_model() and build the optimizer after that",
        )
    forwards = facts.training_forwards
    if not forwards:
        return pending(facts.unobservable or "no training forward was seen in this step")
    merged = facts.merged_units
    units = frozenset().union(
        *(units for name in facts.expected if merged and (units := facts.low_rank_units_of(name)) and units <= merged)
    )
    if not units:
        return ok()
    return fail(
        f"the adapter was merged into the base weights in the training forward: the loss is right, and "
        f"{count(facts.slots_of_units(units))} adapter tensors get no gradient",
        facts.slots_of_units(units),
        got=f"merged in {len(units)} of {len(facts.units)} adapted layers",
        expected="not merged",
    )


CHECK = Check(
    code="LP103",
    name="merged-adapter",
    what="The adapter is merged in a training forward, or was merged and unloaded before training.",
    why="A merged layer computes the same output from the merged base weight alone, so the loss looks right; "
    "requires_grad is still True, and with gradient checkpointing backward() succeeds.",
    fix="Call unmerge_adapter() in a finally block around whatever merged it (generation, evaluation, weight "
    "sync), so that an exception cannot leave it merged.",
    quiet="merge, generate, unmerge between training forwards; MultiheadAttention, which merges inside "
    "its own forward.",
    threads=("huggingface/trl#2873", "huggingface/trl#6688", "huggingface/peft#2437", "huggingface/trl#4713"),
    judge=also_at_estimators(judge),
)
