from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, ZERO, bad, expect, facts

from lora_probe_callbacks.checks.values.dead_pair import CHECK, judge
from lora_probe_callbacks.facts import (
    Facts,
    StartFact,
    UnitStart,
)

FRESH = UnitStart(a=0.1, b=0.0, product=0.0, moves_base=False)


TRAINED = UnitStart(a=0.1, b=0.1, product=0.3, moves_base=False)


DEAD = UnitStart(a=0.0, b=0.0, product=0.0, moves_base=False)


def started(*units: UnitStart | None, step: int = 0, state: bool = False, **changes: Any) -> Facts:
    return facts(start=StartFact(tuple(units), step, state), **changes)


@pytest.mark.parametrize(
    ("units", "status"),
    [
        ((FRESH, FRESH), "pass"),
        ((DEAD, TRAINED), "fail"),
        ((None, None), "skipped"),
        ((None, DEAD), "fail"),
        ((UnitStart(0.0, 0.1, 0.0, moves_base=False), FRESH), "pass"),
    ],
)
def test_dead_pair(units: tuple[UnitStart | None, ...], status: str) -> None:
    assert judge(started(*units)).status == status


def test_dead_pair_is_told() -> None:
    expect(
        judge(started(TRAINED, DEAD)),
        "fail",
        "A and B are both exactly zero in 1 of 2 adapted layers, and will stay so: layer.1",
        slots=[2, 3],
        got="A = 0 and B = 0 when training began",
        expected="one of them zero, the other not",
    )
    assert judge(started(DEAD, DEAD)).slots == ALL


def test_what_cannot_be_judged_says_why() -> None:
    expect(CHECK.judge(facts()), "pending", "no training forward has begun")
    expect(judge(started(None)), "skipped", "no expected layer has a pair of A and B that can be read")


def test_dead_pair_explains_zero_gradients_and_a_fresh_start() -> None:
    what = started(DEAD, DEAD, resumed=True, gradients=[ZERO] * 4, history={"zero": 4, "had_signal": False})
    assert list(bad(what)) == ["LP503"]
