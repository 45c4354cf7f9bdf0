"""LP105: the adapter was activated or switched after the forward."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending
from lora_probe_callbacks.checks.estimator._estimators import also_at_estimators
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Compare the state of the adapter in the forward with its state afterwards."""
    forwards = facts.training_forwards
    if not forwards:
        return pending(facts.unobservable or "no training forward was seen in this step")
    late = frozenset(
        u
        for u in facts.bad_units() - facts.bad_units("merged")
        if facts.modes[u] == "active" or any((f.modes_at_backward or facts.modes)[u] == "active" for f in forwards)
    )
    if late and not _in_turns(facts, late):
        return fail(
            f"the adapter was activated after the forward: active adapters were {list(forwards[0].active)} in the "
            f"forward and {list(facts.active)} after it",
            facts.slots_of_units(late),
            cause="activated",
            got=f"{forwards[0].modes[min(late)]} in the forward, active after it",
            expected="active before the forward",
        )
    still_active = any(set(f.modes_at_backward or ()) <= {"active"} for f in forwards)
    switched = frozenset(
        u
        for u in range(0 if still_active else len(facts.units))
        if u not in facts.odd_modes
        and all((f.modes_at_backward or f.modes)[u] != "active" for f in forwards)
        and _without_gradient(facts, u)
    )
    if switched:
        modes = forwards[0].modes_at_backward or facts.modes
        return fail(
            "the adapter was switched between the forward and its backward: checkpointed layers are run again in the "
            f"backward, then {modes[min(switched)]}, and their adapters get no gradient",
            facts.slots_of_units(switched),
            cause="switched",
            got=f"active in the forward, {modes[min(switched)]} in the backward",
            expected="the same state until the backward has ended",
            fix="do whatever switches the adapter (a reference forward, a generation) before the training forward, or "
            "after backward()",
        )
    return ok()


def _in_turns(facts: Facts, late: frozenset[int]) -> bool:
    """Another expected adapter made this loss and has its gradients; the next one was activated for its own forward."""
    others = [name for name in facts.expected if not facts.units_of(name) & late]
    return any(
        facts.gradients.signal[facts.slots.of_adapter(name)].any() and not facts.units_of(name) & facts.bad_units()
        for name in others
    )


def _without_gradient(facts: Facts, unit: int) -> bool:
    slots = list(facts.units[unit].slots)
    return bool(facts.gradients.read[slots].any()) and not facts.gradients.present[slots].any()


CHECK = Check(
    code="LP105",
    name="late-activation",
    what="The adapter is in order now, but was not in the forward that made the loss; or the other way round, "
    "before a backward that runs checkpointed layers again.",
    why="A test that looks at the model before or after the step finds everything in order.",
    fix="Activate the adapter before the forward: set_adapter(), enable_adapter_layers() first, then the forward, "
    "then backward().",
    quiet="Switching for a reference forward or a generation in between, where the gradients arrive all the same.",
    judge=also_at_estimators(judge),
)
