"""LP201: an adapter tensor that no optimizer owns."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, some
from lora_probe_callbacks.facts import Facts, count, mask


def judge(facts: Facts) -> Verdict:
    """Look for trainable adapter tensors that are in no parameter group."""
    if facts.optimizers == 0:
        return pending("no optimizer is known yet")
    slots, intended = facts.slots, count(facts.intended)
    replaced = mask(facts.replaced, len(slots))
    missing = facts.intended & ~replaced & ~slots.owned & slots.requires_grad & facts.on_now
    if not missing.any():
        return ok() if intended else pending("no adapter tensor is expected to train")
    return fail(
        f"{count(missing)} of {intended} adapter tensors are in no optimizer: {some(slots.names(missing))}",
        missing,
        got=f"{intended - count(missing)} of {intended} adapter tensors among the "
        f"{facts.optimizer_tensors} tensors of {facts.optimizers} optimizer(s)",
        expected=f"{intended} of {intended}",
    )


CHECK = Check(
    code="LP201",
    name="missing-from-optimizer",
    what="A trainable adapter tensor is in no parameter group of any optimizer, by object, not by name.",
    why="Its gradient is right and nobody applies it. An optimizer built before the adapter holds frozen base weights, whose "
    "gradients stay None, and step() does nothing without a word.",
    fix="Build the optimizer after the adapter is attached, from [p for p in model.parameters() if p.requires_grad]. Under "
    "Lightning attach it in __init__, setup or configure_model: configure_optimizers runs before on_fit_start.",
    quiet="Frozen tensors; adapters that are not active.",
    threads=("adapter-hub/adapters#260", "Lightning-Universe/lightning-GPT#17"),
    explained_by=("LP101", "LP102", "LP105", "LP106", "LP202", "LP203"),
    needs=("owned",),
    early=True,
    judge=judge,
)
