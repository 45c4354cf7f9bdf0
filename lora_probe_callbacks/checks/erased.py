"""LP407: a step threw the adapter's values away."""

from __future__ import annotations

import math

from lora_probe_callbacks.checks.base import Check, Verdict, fail, ok, pending, some
from lora_probe_callbacks.observe.facts import Facts, UpdateFact

LEFT = 0.1  # of the norm of B before the step
FACTOR = 10.0  # times what the rate, the gradient and weight decay account for: Adam steps by 3.2 rates at most


def judge(facts: Facts) -> Verdict:
    """Look for a step after which next to nothing is left of B, and which its gradient does not explain."""
    if facts.update is None:
        return pending("no update was seen yet")
    pairs = [
        (i, u)
        for i, u in enumerate(facts.update.slots)
        if u is not None and facts.slots[i].role == "B" and u.start > 0 and i in facts.intended
    ]
    if not pairs:
        return pending("no B has a value that a step could erase")
    erased = [i for i, u in pairs if u.finite and u.norm < LEFT * u.start and u.size > FACTOR * _explained(facts, i, u)]
    if len(erased) < len(pairs):
        return ok()
    starts, ends = math.hypot(*(u.start for _, u in pairs)), math.hypot(*(u.norm for _, u in pairs))
    return fail(
        f"one step erased the adapter: the norm of B fell from {starts:.3g} to {ends:.3g} in all {len(pairs)} adapted layers, "
        f"{some([facts.slots[i].name for i in erased], 2)}",
        erased,
        of_update=True,
        got=f"a change of {starts:.3g} at a learning rate of {facts.slots[erased[0]].learning_rate:g}",
        expected="a change of the size of rate and gradient",
    )


def _explained(facts: Facts, slot: int, update: UpdateFact) -> float:
    """A generous size of the step: every element by the rate, or the gradient times the rate, and weight decay."""
    rate = facts.slots[slot].learning_rate
    if rate is None:
        return float("inf")  # a rate that is NaN explains everything as well: nothing is above it
    gradient = facts.update.gradient_norms[slot] if facts.update is not None and facts.update.gradient_norms else None
    decay = (facts.slots[slot].weight_decay or 0.0) * update.start
    return rate * max(math.sqrt(facts.slots[slot].numel), gradient or 0.0, decay)


CHECK = Check(
    code="LP407",
    name="erased-by-step",
    what="After one step less than a tenth of every B is left, although learning rate, gradient and weight decay explain no such change.",
    why="A mixed-precision optimizer keeps float32 copies that were made before the adapter was restored, and writes them back at its first "
    "step. The loss jumps to where training began, and falls again.",
    fix="Build the optimizer after the adapter was restored, or load the restored values into its master copies too.",
    quiet="Large learning rates, weight decay and loss spikes, which the rate explains; adapters whose B was zero.",
    threads=("radixark/miles#2572",),
    explained_by=("LP202", "LP501"),
    judge=judge,
)
