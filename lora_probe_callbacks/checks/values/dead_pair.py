"""LP503: A and B of one layer are both zero."""

from __future__ import annotations

import numpy as np

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped, some
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for layers in which neither factor can give the other a gradient."""
    return _since_a_step(facts) or _from_the_start(facts)


def _since_a_step(facts: Facts) -> Verdict | None:
    """A step that leaves both at zero has no momentum that could bring them back."""
    update, start, slots = facts.update, facts.start, facts.slots
    if update is None or start is None or not start.known:
        return None
    pair = update.stepped & (slots.of_role("A") | slots.of_role("B"))
    alive = np.bincount(slots.unit[pair & (update.norm != 0.0)], minlength=len(facts.units))
    judged = np.bincount(slots.unit[pair], minlength=len(facts.units))
    zero = set(np.flatnonzero((judged >= 2) & (alive == 0)).tolist())
    dead = [u for u in start.known if u in zero] if zero else []
    if not dead:
        return None
    return fail(
        f"A and B are both exactly zero after the step in {len(dead)} of {len(start.known)} adapted layers, and will stay so: "
        f"{some([facts.units[u].name for u in dead])}",
        facts.slots_of_units(dead),
        cause="zeroed",
        of_update=True,
        got="A = 0 and B = 0 after a step",
        expected="one of them zero at most",
        fix="find what wrote zeros to both factors (a reset, a prune, a merge that starts anew): one of the two must be initialised again, A as a rule",
    )


def _from_the_start(facts: Facts) -> Verdict:
    if facts.start is None:
        return pending("no training forward has begun")
    known, dead = facts.start.known, facts.start.dead
    if not known:
        return skipped("no expected layer has a pair of A and B that can be read")
    if not dead:
        return ok()
    return fail(
        f"A and B are both exactly zero in {len(dead)} of {len(known)} adapted layers, and will stay so: "
        f"{some([facts.units[u].name for u in dead])}",
        facts.slots_of_units(dead),
        got="A = 0 and B = 0 when training began",
        expected="one of them zero, the other not",
    )


CHECK = Check(
    code="LP503",
    name="dead-pair",
    what="Both factors of an adapted layer are exactly zero when training begins, or after a step.",
    why="The gradient of A is made with B and that of B with A: both are zero for ever, without an error. It happens to adapters that are "
    "made without memory (init_empty_weights, to_empty) and filled with zeros, and to checkpoints of which nothing was loaded.",
    fix="Call reset_lora_parameters(adapter, True) on these layers, or load the adapter again.",
    quiet="B = 0 beside a random A, A = 0 beside a random B (embeddings, MiCA); AdaLoRA, whose third factor is zero.",
    needs=("initial state",),
    judge=judge,
)
