"""LP101: the expected adapter is not active in the forward that trains."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, warn
from lora_probe_callbacks.checks.estimator._estimators import also_at_estimators
from lora_probe_callbacks.facts import Bools, Facts

LONG_STEPS = 100  # for which an adapter that nobody declared may wait for its turn


def judge(facts: Facts) -> Verdict:
    """Look for expected adapters that no training forward of the step had active."""
    forwards = facts.training_forwards
    if not forwards:
        return pending(facts.unobservable or "no training forward was seen in this step")
    inactive = facts.bad_units("inactive")
    bad = {u for name in facts.expected if inactive and (u := facts.units_of(name)) and u <= inactive}
    if not bad:
        return ok()
    units = frozenset().union(*bad)
    slots = facts.slots_of_units(units)
    names = [name for name in facts.expected if facts.units_of(name) in bad]
    others_active = len(names) < len(facts.expected)
    if others_active:
        return _others_train(facts, names, slots)
    now_active = all(facts.modes[u] == "active" for u in units)
    if now_active:
        return ok()  # LP105: it was activated after the forward
    return fail(
        f"adapter {', '.join(map(repr, names))} was not active in the training forward; {list(forwards[0].active)} was",
        slots,
        got=f"active adapters {list(forwards[0].active)} in {forwards[0].module}",
        expected=f"active adapters {names}",
        fix=f"call model.set_adapter({names[0]!r}) before the forward that makes the loss, and after "
        "anything that switches adapters; add_adapter() and load_adapter() do not activate what they add",
    )


def _others_train(facts: Facts, names: list[str], slots: Bools) -> Verdict:
    """Some expected adapters are active, others are not: they may take turns."""
    if facts.history.had_gradient[slots & ~facts.slots.of_role("A")].all():
        return ok()
    if (facts.history.missing[slots] < PERSISTENT).any():
        return pending(f"{names} not active yet, others of {list(facts.expected)} are: they may take turns")
    owner = facts.slots.owner
    tenants = not facts.declared and not set(owner[slots].tolist()) & set(owner[facts.intended & ~slots].tolist())
    if tenants and facts.step < LONG_STEPS and facts.moment != "end":
        return pending(f"{names}, with an optimizer of its own, has not had its turn")
    return warn(
        f"adapter {', '.join(map(repr, names))} was not active in any of {PERSISTENT} probed steps, while others that "
        "are expected to train were",
        slots,
        got=f"active adapters {list(facts.training_forwards[0].active)}",
        expected=f"each of {list(facts.expected)} in its turn",
        fix=f"if the turn of {names[0]!r} is still to come nothing is wrong; else call model.set_adapter({names[0]!r}) before "
        "its training forward",
    )


CHECK = Check(
    code="LP101",
    name="inactive-adapter",
    what="An adapter that is expected to train is not active in any training forward of the step.",
    why="Another adapter is active instead, so the loss is right and falls: the wrong adapter learns. "
    "PeftModel.add_adapter keeps the first adapter active, transformers' add_adapter the newest.",
    fix="Call set_adapter(name) before the forward that makes the loss.",
    quiet="Adapters that take turns; adapters declared as reference or lagged; a reference forward under "
    "no_grad or one whose output is detached.",
    threads=("huggingface/peft#1444", "unslothai/unsloth#1592", "huggingface/peft#3580"),
    explained_by=("LP207",),
    judge=also_at_estimators(judge),
)
