from __future__ import annotations

from typing import Any

import pytest
from facts import ZERO, bad, facts

from lora_probe_callbacks.checks.dead_pair import judge
from lora_probe_callbacks.observe.facts import (
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
    assert judge(facts()).status == "pending"


def test_dead_pair_explains_zero_gradients_and_a_fresh_start() -> None:
    what = started(DEAD, DEAD, resumed=True, gradients=[ZERO] * 4, history={"zero": 4, "had_signal": False})
    assert list(bad(what)) == ["LP503"]
