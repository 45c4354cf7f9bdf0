"""The scalars that go to the loggers: fixed names, a constant number of them."""

from __future__ import annotations

import math

from lora_probe_callbacks.facts import Facts, Role, StepResponse, count

__all__ = ["metrics_of_estimators", "metrics_of_response", "metrics_of_step", "metrics_of_update"]

_ROLES: tuple[Role, Role] = ("A", "B")


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
    if intended.any():
        values["identity/optimizer_coverage"] = count(facts.slots.owned & intended) / count(intended)
    read = facts.gradients.read & intended
    if read.any():
        values["reachability/loss_fraction"] = count(facts.gradients.present & read) / count(read)
        for role, squares in zip(_ROLES, facts.total.gradients, strict=True):
            values[f"gradient/norm_{role}"] = math.sqrt(squares)
    step = facts.supervision
    if step is not None and len(step):
        supervised = int(step.supervised.sum())
        values["supervision/token_fraction"] = supervised / max(1, int(step.real.sum()))
        values["supervision/empty_row_fraction"] = count(step.empty) / len(step)
        values["supervision/stop_token_fraction"] = int(step.stops.sum()) / max(1, supervised)
    return {f"lora_probe/{name}": value for name, value in values.items()}


def metrics_of_estimators(facts: Facts) -> dict[int, dict[str, float]]:
    """Which part of the adapter the estimators reach that were looked at since the last decision.

    Args:
        facts: What one decision knows.

    Returns:
        The framework's number of a step to metric name to value.
    """
    intended = facts.intended_slots
    reached = {e.framework_step: e.reached & intended for e in facts.estimators if e.reached is not None}
    name = "lora_probe/reachability/estimator_fraction"
    return {step: {name: len(slots) / len(intended)} for step, slots in reached.items() if intended}


def metrics_of_update(facts: Facts) -> dict[str, float]:
    """What one decision knows of the last update.

    Args:
        facts: Its facts.

    Returns:
        Metric name to value.
    """
    if facts.update is None:
        return {}
    sums = facts.total
    values = {"update/relative_norm": math.sqrt(sums.size / sums.norm) if sums.norm else 0.0}
    for index, role in enumerate(_ROLES):
        # After clipping, which a reading before the step may come before.
        if (facts.update.received & facts.slots.of_role(role)).any() or sums.received[index]:
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
