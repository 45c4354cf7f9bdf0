from __future__ import annotations

import dataclasses

import pytest
from facts import bad, facts

from lora_probe_callbacks.checks.uneven_rate import judge
from lora_probe_callbacks.observe.facts import (
    Facts,
)


def rates(*units: tuple[str, float, float]) -> Facts:
    """Part of B, rate of A, rate of B, of each unit."""
    what = facts(units=len(units))
    slots = []
    for slot in what.slots:
        part, a, b = units[slot.unit]
        slots.append(slot._replace(learning_rate=a if slot.role == "A" else b, part=part))
    return dataclasses.replace(what, slots=tuple(slots))


def test_kind_of_b_with_the_rate_of_a_warns() -> None:
    what = rates(("lora_B", 1e-4, 1e-3), ("lora_embedding_B", 1e-4, 1e-4))
    assert bad(what)["LP210"].slots == {3}


@pytest.mark.parametrize(
    "units",
    [
        [("lora_B", 1e-4, 1e-4), ("lora_embedding_B", 1e-4, 1e-4)],
        [("lora_B", 1e-4, 1e-3), ("lora_embedding_B", 1e-4, 1e-3)],
        [("lora_B", 1e-4, 1e-3), ("lora_embedding_B", 1e-6, 1e-6)],
        [("lora_B", 1e-4, 1e-3), ("lora_B", 1e-4, 1e-4)],
        [("lora_B", 1e-4, 1e-3), ("lora_B", 1e-4, 2e-3), ("lora_embedding_B", 1e-4, 1e-4)],
    ],
)
def test_other_rates_pass(units: list[tuple[str, float, float]]) -> None:
    assert judge(rates(*units)).status == "pass"


def test_rates_of_zero_or_unknown_are_not_judged() -> None:
    assert judge(facts(slot={"learning_rate": 0.0})).status == "pending"
    assert judge(facts(slot={"learning_rate": None})).status == "pending"
    assert judge(facts(slot={"learning_rate": float("nan")})).status == "pending"
