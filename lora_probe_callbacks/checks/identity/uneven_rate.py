"""LP210: some B have the learning rate of A, while the others have one of their own."""

from __future__ import annotations

import numpy as np

from lora_probe_callbacks.checks._base import Check, Verdict, ok, pending, some, warn
from lora_probe_callbacks.facts import Facts, count


def judge(facts: Facts) -> Verdict:
    """Look for B that a rule for groups has passed over."""
    slots = facts.slots
    known = facts.intended & (slots.rate > 0.0)
    rate_of_a = np.full(len(facts.units), np.nan)  # by unit
    a = known & slots.of_role("A")
    rate_of_a[slots.unit[a]] = slots.rate[a]
    beside = rate_of_a[slots.unit]  # the rate of the A of the same unit
    b = known & slots.of_role("B") & ~np.isnan(beside)
    if not b.any():
        return pending("no pair of A and B has a learning rate above 0")
    apart = b & (slots.rate != beside)
    rates = set(zip(beside[apart].tolist(), slots.rate[apart].tolist(), strict=True))
    if len(rates) != 1:
        return ok()
    rate_a, rate_b = next(iter(rates))
    passed_over = b & ~apart & (slots.rate == rate_a)
    kinds = {slots.part[i] for i in np.flatnonzero(passed_over)}
    if not count(passed_over) or kinds & {slots.part[i] for i in np.flatnonzero(apart)}:
        return ok()
    return warn(
        f"{', '.join(sorted(kinds))} has the learning rate of A, {rate_a:g}, while every other B has {rate_b:g}: "
        f"{some(slots.names(passed_over))}",
        passed_over,
        got=f"learning rate {rate_a:g} for {sorted(kinds)}",
        expected=f"{rate_b:g}, as for the other B, or a rate of their own",
        fix="look at how the groups of the optimizer are made (LoRA+: loraplus_lr_ratio, loraplus_lr_embedding); if this kind of layer is meant "
        "to learn more slowly nothing is wrong",
    )


CHECK = Check(
    code="LP210",
    name="uneven-rate",
    what="B has a learning rate of its own, as under LoRA+, but all B of one kind (those of embeddings) have that of A. It warns.",
    why="A rule that sorts tensors into groups by name or type passes over a kind, and its group stays empty without a word.",
    fix="See which tensors each group of the optimizer holds.",
    quiet="One rate for all; a ratio that holds for every kind; embeddings with a rate of their own; rates that differ from layer to layer.",
    threads=("huggingface/peft#3499", "huggingface/peft#3503"),
    judge=judge,
)
