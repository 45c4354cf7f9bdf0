"""LP210: some B have the learning rate of A, while the others have one of their own."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, ok, pending, some, warn
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for B that a rule for groups has passed over."""
    known = [i for i in sorted(facts.intended) if (rate := facts.rates[i]) is not None and rate > 0]
    if len({facts.rates[i] for i in known}) == 1 and {"A", "B"} <= {facts.slots[i].role for i in known}:
        return ok()
    first = {facts.slots[i].unit: i for i in known if facts.slots[i].role == "A"}
    pairs = [
        (first[facts.slots[i].unit], i) for i in known if facts.slots[i].role == "B" and facts.slots[i].unit in first
    ]
    if not pairs:
        return pending("no pair of A and B has a learning rate above 0")
    rates = {a: (facts.rates[a] or 0.0, facts.rates[b] or 0.0) for a, b in pairs}
    apart = {pair for pair in rates.values() if pair[0] != pair[1]}
    passed_over = [b for a, b in pairs if rates[a][0] == rates[a][1] and rates[a][0] in {pair[0] for pair in apart}]
    kinds = {facts.slots[b].part for b in passed_over}
    if len(apart) != 1 or not passed_over or any(facts.slots[b].part in kinds for a, b in pairs if rates[a] in apart):
        return ok()
    rate_a, rate_b = next(iter(apart))
    return warn(
        f"{', '.join(sorted(kinds))} has the learning rate of A, {rate_a:g}, while every other B has {rate_b:g}: "
        f"{some([facts.slots[b].name for b in passed_over])}",
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
