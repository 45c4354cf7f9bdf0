from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, MOVED, ZERO, Change, bad, expect, facts

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


ZEROED = Change(start=1.0, moved=1.0, size=1.0, norm=0.0)


def test_pair_that_is_zero_after_a_step_fails_at_once() -> None:
    what = started(FRESH, FRESH, updates=[MOVED, MOVED, ZEROED, ZEROED])
    assert list(bad(what)) == ["LP503"]
    fix = "find what wrote zeros to both factors (a reset, a prune, a merge that starts anew)"
    expect(
        judge(what),
        "fail",
        "A and B are both exactly zero after the step in 1 of 2 adapted layers, and will stay so: layer.1",
        slots=[2, 3],
        cause="zeroed",
        of_update=True,
        got="A = 0 and B = 0 after a step",
        expected="one of them zero at most",
        fix=fix,
    )
    assert judge(started(FRESH, FRESH, updates=[ZEROED] * 4)).slots == ALL


@pytest.mark.parametrize(
    "updates",
    [
        [MOVED, MOVED, MOVED, ZEROED],
        [MOVED, MOVED, ZEROED, MOVED],
        [MOVED, MOVED, None, None],
        [MOVED, MOVED, ZEROED, None],
        [None] * 4,
    ],
)
def test_half_of_a_pair_at_zero_passes(updates: list[Change | None]) -> None:
    expect(judge(started(FRESH, FRESH, updates=updates)), "pass")


def test_pair_that_cannot_be_read_or_is_no_pair_is_left_alone() -> None:
    zeroed = {"updates": [MOVED, MOVED, ZEROED, ZEROED]}
    expect(judge(started(FRESH, None, **zeroed)), "pass")
    expect(judge(started(FRESH, FRESH, at={i: {"role": "other"} for i in (2, 3)}, **zeroed)), "pass")
    expect(judge(facts(**zeroed)), "pending", "no training forward has begun")
    expect(judge(started(None, None, **zeroed)), "skipped", "no expected layer has a pair")
    expect(judge(started(FRESH, FRESH, update=None)), "pass")


def test_what_cannot_be_judged_says_why() -> None:
    expect(CHECK.judge(facts()), "pending", "no training forward has begun")
    expect(judge(started(None)), "skipped", "no expected layer has a pair of A and B that can be read")


def test_dead_pair_explains_zero_gradients_and_a_fresh_start() -> None:
    what = started(DEAD, DEAD, resumed=True, gradients=[ZERO] * 4, history={"zero": 4, "had_signal": False})
    assert list(bad(what)) == ["LP503"]
