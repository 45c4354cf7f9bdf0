from __future__ import annotations

import math

import numpy as np
import pytest
from support.facts import bad, expect, facts, with_slots

from lora_probe_callbacks.checks.identity.uneven_rate import CHECK, judge
from lora_probe_callbacks.facts import (
    Facts,
)


def rates(*units: tuple[str, float | None, float | None]) -> Facts:
    """Part of B, rate of A, rate of B, of each unit."""
    what = facts(units=len(units))
    part = tuple(units[unit][0] for unit in what.slots.unit)
    rate = np.array([math.nan if rate is None else rate for _, a, b in units for rate in (a, b)])
    return with_slots(what, part=part, rate=rate)


LINEAR = ("lora_B", 1e-4, 1e-3)
EMBEDDING = ("lora_embedding_B", 1e-4, 1e-4)


def test_kind_of_b_with_the_rate_of_a_warns() -> None:
    what = rates(LINEAR, EMBEDDING, LINEAR, EMBEDDING)
    expect(
        judge(what),
        "warn",
        "lora_embedding_B has the learning rate of A, 0.0001, while every other B has 0.001: "
        "layer.1.lora_B, layer.3.lora_B",
        slots=[3, 7],
        got="learning rate 0.0001 for ['lora_embedding_B']",
        expected="0.001, as for the other B, or a rate of their own",
        fix="look at how the groups of the optimizer are made",
    )
    assert list(bad(what)) == ["LP210"]


def test_kinds_are_told_together() -> None:
    verdict = judge(rates(LINEAR, EMBEDDING, ("conv_B", 1e-4, 1e-4)))
    assert verdict.message.startswith("conv_B, lora_embedding_B has")
    assert verdict.slots == {3, 5}


@pytest.mark.parametrize(
    "units",
    [
        [("lora_B", 1e-4, 1e-4), ("lora_embedding_B", 1e-4, 1e-4)],
        [LINEAR, ("lora_embedding_B", 1e-4, 1e-3)],
        [LINEAR, ("lora_embedding_B", 1e-6, 1e-6)],
        [LINEAR, ("lora_B", 1e-4, 1e-4)],
        [LINEAR, ("lora_B", 1e-4, 2e-3), EMBEDDING],
        [LINEAR, ("lora_B", 1e-4, 1e-4), EMBEDDING],
        [LINEAR],
    ],
)
def test_other_rates_pass(units: list[tuple[str, float, float]]) -> None:
    assert judge(rates(*units)).status == "pass"


def test_layers_without_a_rate_are_left_out() -> None:
    verdict = judge(rates(LINEAR, ("lora_B", None, 2e-3), ("lora_B", 1e-4, 0.0), EMBEDDING))
    assert (verdict.status, verdict.slots) == ("warn", {7})


def test_what_stays_frozen_is_left_out() -> None:
    what = rates(LINEAR, EMBEDDING)
    assert judge(with_slots(what, frozen_by_intent=what.slots.unit == 1)).status == "pass"


@pytest.mark.parametrize("rate", [0.0, None, float("nan"), -1.0])
def test_rates_of_zero_or_unknown_are_not_judged(rate: float | None) -> None:
    words = "no pair of A and B has a learning rate above 0"
    expect(CHECK.judge(facts(slot={"learning_rate": rate})), "pending", words)


def test_rate_of_zero_is_left_to_its_own_check() -> None:
    what = facts(slot={"learning_rate": 0.0}, history={"rate_zero": 4, "had_rate": False})
    assert list(bad(what)) == ["LP208"]


@pytest.mark.parametrize(("of_a", "of_b"), [(None, 1e-3), (1e-4, None), (0.0, 1e-3)])
def test_without_a_pair_of_rates_there_is_nothing_to_compare(of_a: float | None, of_b: float | None) -> None:
    expect(judge(rates(("lora_B", of_a, of_b))), "pending", "no pair of A and B has a learning rate above 0")
