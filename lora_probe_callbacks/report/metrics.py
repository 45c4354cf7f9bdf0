"""The scalars that go to the loggers: fixed names, a constant number of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lora_probe_callbacks.observe.facts import Facts, Role, StepResponse, Sums

__all__ = ["metrics_of_estimators", "metrics_of_response", "metrics_of_step", "metrics_of_update", "sums_of"]

_ROLES: tuple[Role, Role] = ("A", "B")


def sums_of(facts: Facts, weights: Mapping[int, float]) -> Sums:
    """Sums over some slots, for norms over all of them.

    Args:
        facts: What is known at a decision.
        weights: Slot to its share: 1, or less for a shard that several ranks hold.

    Returns:
        Sums of squares and of elements.
    """
    gradients, received, moved, elements = ({"A": 0.0, "B": 0.0, "other": 0.0} for _ in range(4))
    size = norm = 0.0
    intended, update = facts.intended, facts.update
    for i, gradient in enumerate(facts.gradients):
        if gradient is not None and i in intended and i in weights:
            gradients[facts.slots[i].role] += weights[i] * gradient.norm**2
    for i, change in enumerate(() if update is None else update.slots):
        if change is not None and i in weights:
            slot, weight = facts.slots[i], weights[i]
            moved[slot.role] += weight * slot.numel * change.moved
            elements[slot.role] += weight * slot.numel
            size += weight * change.size**2
            norm += weight * change.norm**2
    for i, value in enumerate(() if update is None else update.gradient_norms):
        if value is not None and i in weights:
            received[facts.slots[i].role] += weights[i] * value**2
    a, b = _ROLES
    return Sums(
        gradients=(gradients[a], gradients[b]),
        received=(received[a], received[b]),
        moved=(moved[a], moved[b]),
        elements=(elements[a], elements[b]),
        size=size,
        norm=norm,
    )


def _sums(facts: Facts) -> Sums:
    return facts.sums or sums_of(facts, dict.fromkeys(range(len(facts.slots)), 1.0))


def metrics_of_step(facts: Facts) -> dict[str, float]:
    """What one decision knows of the step being decided.

    Args:
        facts: Its facts.

    Returns:
        Metric name to value; fractions are of the adapter tensors that are meant to train.
    """
    intended = facts.intended
    values: dict[str, float] = {}
    forwards = facts.training_forwards
    if forwards and facts.units:
        bad = facts.bad_units()
        values["activation/active_fraction"] = 1 - len(bad) / len(facts.units)
        called = facts.called_units
        if called is not None:
            values["identity/forward_coverage"] = len(called) / len(facts.units)
    if intended:
        owned = sum(facts.slots[i].owner is not None for i in intended)
        values["identity/optimizer_coverage"] = owned / len(intended)
    read = [(i, g) for i, g in enumerate(facts.gradients) if g is not None and i in intended]
    if read:
        values["reachability/loss_fraction"] = sum(g.present for _, g in read) / len(read)
        for role, squares in zip(_ROLES, _sums(facts).gradients, strict=True):
            values[f"gradient/norm_{role}"] = math.sqrt(squares)
    return {f"lora_probe/{name}": value for name, value in values.items()}


def metrics_of_estimators(facts: Facts) -> dict[int, dict[str, float]]:
    """Which part of the adapter the estimators reach that were looked at since the last decision.

    Args:
        facts: What one decision knows.

    Returns:
        The framework's number of a step to metric name to value.
    """
    reached = {e.framework_step: e.reached & facts.intended for e in facts.estimators if e.reached is not None}
    name = "lora_probe/reachability/estimator_fraction"
    return {step: {name: len(slots) / len(facts.intended)} for step, slots in reached.items() if facts.intended}


def metrics_of_update(facts: Facts) -> dict[str, float]:
    """What one decision knows of the last update.

    Args:
        facts: Its facts.

    Returns:
        Metric name to value.
    """
    if facts.update is None:
        return {}
    sums = _sums(facts)
    values = {"update/relative_norm": math.sqrt(sums.size / sums.norm) if sums.norm else 0.0}
    present = {s.role for s, n in zip(facts.slots, facts.update.gradient_norms, strict=False) if n is not None}
    for index, role in enumerate(_ROLES):
        if role in present or sums.received[index]:  # after clipping, which a reading before the step may come before
            values[f"gradient/norm_{role}"] = math.sqrt(sums.received[index])
        elements = sums.elements[index]
        values[f"update/moved_fraction_{role}"] = sums.moved[index] / elements if elements else 0.0
    return {f"lora_probe/{name}": value for name, value in values.items()}


def metrics_of_response(response: StepResponse) -> dict[str, float]:
    """What a step did to the loss.

    Args:
        response: What was measured.

    Returns:
        Metric name to value; nothing where nothing was measured.
    """
    if response.predicted is None or response.measured is None:
        return {}
    values = {"predicted": response.predicted, "measured": response.measured}
    if response.predicted:
        values["ratio"] = response.measured / response.predicted
    return {f"lora_probe/step_response/{name}": value for name, value in values.items()}
