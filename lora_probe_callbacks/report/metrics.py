"""The scalars that go to the loggers: fixed names, a constant number of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lora_probe_callbacks.observe.facts import Facts, Role, StepResponse

__all__ = ["metrics_of_response", "metrics_of_step", "metrics_of_update"]


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
        for role in ("A", "B"):
            norms = [g.norm for i, g in read if facts.slots[i].role == role]
            values[f"gradient/norm_{role}"] = math.sqrt(sum(n * n for n in norms))
    led = [e.reached for e in facts.estimators if e.reached is not None]
    if led and intended:
        values["reachability/estimator_fraction"] = len(led[-1] & intended) / len(intended)
    return {f"lora_probe/{name}": value for name, value in values.items()}


def metrics_of_update(facts: Facts) -> dict[str, float]:
    """What one decision knows of the last update.

    Args:
        facts: Its facts.

    Returns:
        Metric name to value.
    """
    if facts.update is None:
        return {}
    updates = [(facts.slots[i], u) for i, u in enumerate(facts.update.slots) if u is not None]
    size, norm = _root((u.size for _, u in updates)), _root((u.norm for _, u in updates))
    values = {"update/relative_norm": size / norm if norm else 0.0}
    roles: tuple[Role, ...] = ("A", "B")
    for role in roles:
        mine = [(s.numel, u.moved) for s, u in updates if s.role == role]
        elements = sum(n for n, _ in mine)
        norms = [
            n
            for s, n in zip(facts.slots, facts.update.gradient_norms, strict=False)
            if n is not None and s.role == role
        ]
        if norms:  # after clipping, which a reading before the step may come before
            values[f"gradient/norm_{role}"] = _root(norms)
        values[f"update/moved_fraction_{role}"] = sum(n * m for n, m in mine) / elements if elements else 0.0
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


def _root(values: Iterable[float]) -> float:
    return math.sqrt(sum(v * v for v in values))
