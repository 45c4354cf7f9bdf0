"""LP407: a step threw the adapter's values away."""

from __future__ import annotations

import numpy as np

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, some
from lora_probe_callbacks.facts import Bools, Facts, Update, count

LEFT = 0.1  # of the norm of B before the step
FACTOR = 10.0  # times what the rate, the gradient and weight decay account for: Adam steps by 3.2 rates at most


def judge(facts: Facts) -> Verdict:
    """Look for a step after which next to nothing is left of B, and which its gradient does not explain."""
    update = facts.update
    if update is None:
        return pending("no update was seen yet")
    b = facts.intended & facts.slots.of_role("B") & (update.start > 0.0)
    if not b.any():
        return pending("no B has a value that a step could erase")
    if (b & ~_erased(facts, update)).any():
        return ok()
    start, end = (float(np.linalg.norm(column[b])) for column in (update.start, update.norm))
    return fail(
        f"one step erased the adapter: the norm of B fell from {start:.3g} to {end:.3g} in all {count(b)} adapted layers, "
        f"{some(facts.slots.names(b), 2)}",
        b,
        of_update=True,
        got=f"a change of {start:.3g} at a learning rate of {facts.slots.rate[b][0]:g}",
        expected="a change of the size of rate and gradient",
    )


def _erased(facts: Facts, update: Update) -> Bools:
    """Next to nothing is left, and the change is larger than rate, gradient and weight decay account for."""
    slots = facts.slots
    drive = np.fmax(np.fmax(update.gradient_norm, slots.weight_decay * update.start), np.sqrt(slots.numel))
    # What is NaN explains everything, since nothing is above it: an unknown rate, a rate of 0 times an infinite gradient.
    with np.errstate(invalid="ignore"):
        explained = FACTOR * slots.rate * drive
    erased: Bools = (update.norm < LEFT * update.start) & (update.size > explained)
    return erased


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
