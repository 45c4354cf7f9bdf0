"""LP106: the layers of one adapter are in different states."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, some
from lora_probe_callbacks.checks.estimator._estimators import also_at_estimators
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for adapters that are active in some layers only."""
    forwards = facts.training_forwards
    if not forwards:
        return pending(facts.unobservable or "no training forward was seen in this step")
    bad = facts.bad_units() | facts.merged_units
    for name in facts.expected if bad else ():
        units = facts.units_of(name)
        part = units & bad
        if part and part < units:
            modes = sorted({forwards[0].mode(u) for u in part})
            return fail(
                f"adapter {name!r} is active in {len(units) - len(part)} of its {len(units)} layers and "
                f"{' or '.join(modes)} in {len(part)}",
                facts.slots_of_units(part),
                cause=name,
                got=f"{' or '.join(modes)}: {some([facts.units[u].name for u in sorted(part)])}",
                expected="the same state in all layers",
            )
    return ok()


CHECK = Check(
    code="LP106",
    name="irregular-layers",
    what="One adapter is active in some of its layers and disabled, merged or inactive in others.",
    why="Enough layers learn for the loss to fall; the others do nothing or stay as they are.",
    fix="Set the state through the model (set_adapter, enable_adapter_layers, unmerge_adapter), not layer by layer, "
    "and look for an exception in the middle of a merge.",
    quiet="Layers that do not have the adapter at all; modules_to_save, which stay as they are in a merge (LP103).",
    explained_by=("LP103",),
    judge=also_at_estimators(judge),
)
