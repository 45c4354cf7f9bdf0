"""LP407: a step threw the adapter's values away."""

from __future__ import annotations

import math

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, some
from lora_probe_callbacks.facts import Facts, StepUpdate

LEFT = 0.1  # of the norm of B before the step
FACTOR = 10.0  # times what the rate, the gradient and weight decay account for: Adam steps by 3.2 rates at most


def judge(facts: Facts) -> Verdict:
    """Look for a step after which next to nothing is left of B, and which its gradient does not explain."""
    update = facts.update
    if update is None:
        return pending("no update was seen yet")
    b = [i for i in sorted(facts.intended) if facts.slots[i].role == "B" and (update.starts[i] or 0.0) > 0]
    if not b:
        return pending("no B has a value that a step could erase")
    if not all(_erased(facts, update, i) for i in b):
        return ok()
    starts, ends = (math.hypot(*map(column.__getitem__, b)) for column in (update.starts, update.norms))  # type: ignore[arg-type]
    return fail(
        f"one step erased the adapter: the norm of B fell from {starts:.3g} to {ends:.3g} in all {len(b)} adapted layers, "
        f"{some([facts.slots[i].name for i in b], 2)}",
        b,
        of_update=True,
        got=f"a change of {starts:.3g} at a learning rate of {facts.rates[b[0]]:g}",
        expected="a change of the size of rate and gradient",
    )


def _erased(facts: Facts, update: StepUpdate, slot: int) -> bool:
    """Next to nothing is left, and the change is larger than rate, gradient and weight decay account for."""
    start, size, norm, rate = update.starts[slot], update.sizes[slot], update.norms[slot], facts.rates[slot]
    if rate is None or not norm < LEFT * start:  # type: ignore[operator]  # what has a start has been stepped
        return False
    gradient = update.gradient_norms[slot] if update.gradient_norms else None
    decay = (facts.slots[slot].weight_decay or 0.0) * start  # type: ignore[operator]
    # A rate that is NaN explains everything: nothing is above it.
    return size > FACTOR * rate * max(math.sqrt(facts.slots[slot].numel), gradient or 0.0, decay)  # type: ignore[operator]


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
