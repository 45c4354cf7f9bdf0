"""LP108: an adapter that nobody uses and nobody declared."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, ok, pending, warn
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for adapters that were never active, never moved and never declared."""
    idle = [
        o.name
        for o in facts.others
        if o.declared is None and not o.copy and not o.was_active and not o.active_now and not o.ever_changed
    ]
    if not idle:
        return ok()
    if facts.step < PERSISTENT - 1 and facts.moment != "end":
        return pending(f"adapters {idle} were not used yet")
    return warn(
        f"adapter {', '.join(map(repr, idle))} was never active and never moved; {list(facts.expected)} is what trains",
        cause=",".join(idle),
        got=f"idle adapters {idle}",
        expected="every adapter trained, used or declared",
        fix=f"if {idle[0]!r} should train, call set_adapter({idle[0]!r}) before training; if not, pass "
        f"reference_adapters=({idle[0]!r},) or delete it",
    )


CHECK = Check(
    code="LP108",
    name="idle-adapter",
    what="An adapter exists that no forward used, no step moved and no argument declared. It warns.",
    why="add_adapter() and load_adapter() do not activate what they add: the older adapter trains in its place.",
    fix="Activate it, declare it (reference_adapters, lagged_adapters), or delete it.",
    quiet="Declared adapters; a frozen copy of what trains (a reference that was scored before training); adapters that some forward used; adapters that follow another one.",
    threads=("huggingface/peft#1444", "unslothai/unsloth#1592"),
    explained_by=(),
    judge=judge,
)
