"""Which part of an adapter is moved next."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_probe_callbacks.engine.cadence import Cadence
from lora_probe_callbacks.engine.touches import Touches
from lora_probe_callbacks.facts import StepResponse

RIGHT: dict[str, Any] = {"central": 1.0, "noise": 0.001}
WRONG: dict[str, Any] = {"central": 0.5, "near": 0.5, "own": 0.5, "sides": (0.5, 0.5)}


def touches(size: int) -> Touches:
    return Touches(["A", "B"] * (size // 2), np.ones(size, np.bool_))


def look(of: Touches, step: int, seen: dict[str, Any], zero: tuple[int, ...] = ()) -> list[int]:
    there = [i for i in range(len(of)) if i not in zero]
    chosen = of.choose(there, zero)
    of.enter(StepResponse(step, step, slots=tuple(chosen), **seen), cost_more=False)
    return chosen


@pytest.mark.parametrize("size", [4, 24, 392])
def test_each_tensor_is_measured_within_sixteen_touches(size: int) -> None:
    of = touches(size)
    looked = [look(of, step, RIGHT) for step in range(16)]
    assert [len(chosen) for chosen in looked[:2]] == [size, size]
    assert (of.measured >= 2).all()
    assert of.complete
    for chosen in looked[2:]:
        assert len({i % 2 for i in chosen}) == 1, "A or B"


def test_what_was_wrong_once_is_looked_at_again_until_it_is_certain() -> None:
    of = touches(24)
    for step in range(4):
        look(of, step, RIGHT)
    first = look(of, 4, WRONG)
    assert of.in_doubt
    assert look(of, 5, WRONG) == first
    assert not of.in_doubt
    assert look(of, 6, RIGHT) != first


def test_gradients_that_are_always_zero_are_looked_at_but_for_a() -> None:
    of = touches(8)
    zero = (0, 2, 5)
    for step in range(2):
        assert look(of, step, RIGHT, zero) == [1, 3, 4, 6, 7]
    assert look(of, 2, {"stray": 0.0}, zero) == [5]
    assert 5 not in look(of, 3, RIGHT, zero)


def test_what_cannot_be_measured_is_not_tried_for_ever() -> None:
    of = touches(28)
    for step in range(40):
        look(of, step, {"central": 0.7, "noise": 1.0})
    assert of.complete
    assert (of.measured < 0).all()
    of = touches(4)
    for step in range(31):
        look(of, step, RIGHT, zero=(0,))
    assert of.complete, "a tensor without a gradient"


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (3, [0, 1, 3]), (50, [0, 1])])
def test_when_a_part_is_measured(every: int, expected: list[int]) -> None:
    def yes() -> bool:
        return True

    cadence = Cadence(every, alone=yes, borrows=lambda step: False, proven=yes, unstepped=lambda: False)
    steps = [s for s in range(6) if cadence.touches(s, begun=min(s, 2), complete=False, doubt=False)]
    assert steps == expected
    assert cadence.touches(100, begun=9, complete=False, doubt=False) is (
        100 % (2 * every if every > 16 else every) == 0
    )
    assert cadence.touches(7, begun=9, complete=False, doubt=True)
    assert not cadence.touches(100, begun=9, complete=True, doubt=False)
