from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from support.facts import bad, expect, facts

from lora_probe_callbacks.checks.update.undone import CHECK, judge
from lora_probe_callbacks.facts import Facts, Path

TIMES = {"undone": 10, "partly": 10, "times": 2, "way": 5, "fraction": 0.99, "under_way": True, "end_step": 4}


def path(*slots: dict[str, Any], seen: tuple[int, int] = (9, 10)) -> Path:
    """One entry a slot; what is not given is as if nothing was seen."""
    empty = Path.empty(len(slots))
    columns = {}
    for name in TIMES:
        before = getattr(empty, name)
        columns[name] = np.array([slot.get(name, before[i]) for i, slot in enumerate(slots)], before.dtype)
    return dataclasses.replace(empty, seen=seen, **columns)


def brought_back(*slots: dict[str, Any], **changes: Any) -> Facts:
    return facts(path=path(*slots), **changes)


BACK = TIMES
ONCE = {**TIMES, "undone": 5, "partly": 5, "times": 1}
STAYS = {"end_step": 4, "under_way": True}


def test_whole_adapter_that_is_brought_back_twice_fails() -> None:
    what = brought_back(BACK, BACK, BACK, BACK)
    expect(
        judge(what),
        "fail",
        "what the steps do is taken back: between the end of step 9 and the update of step 10 99% of the way of 5",
        "was undone in 4 of 4 adapter tensors, the 2nd time in a row: layer.0.lora_A",
        slots=range(4),
        got="99.0% of the way undone by something that is no step of the optimizer",
        expected="the values that the last step wrote",
        fix="averaged weights that are copied in for a validation and never put back",
    )
    assert list(bad(what)) == ["LP409"]


@pytest.mark.parametrize(
    ("slots", "status"),
    [
        ([ONCE] * 4, "pass"),  # a rollback
        ([{**BACK, "undone": 9}] * 4, "pass"),
        ([BACK, BACK, STAYS, STAYS], "warn"),  # one layer
        ([STAYS, BACK, STAYS, BACK], "fail"),  # every B
        ([BACK, STAYS, BACK, STAYS], "warn"),
        ([BACK, BACK, {"end_step": 4}, {"end_step": 4}], "fail"),  # the rest has not gone anywhere
        ([{**BACK, "undone": 0, "partly": 15}] * 4, "warn"),
        ([{**BACK, "undone": 0, "partly": 14}] * 4, "pass"),
        ([STAYS] * 4, "pass"),
        ([{}] * 4, "pending"),
    ],
)
def test_how_much_and_how_often(slots: list[dict[str, Any]], status: str) -> None:
    assert judge(brought_back(*slots)).status == status


def test_one_adapter_of_two_fails() -> None:
    names = {2: {"adapter": "b"}, 3: {"adapter": "b"}}
    assert judge(brought_back(STAYS, STAYS, BACK, BACK, at=names)).status == "fail"


def test_a_single_step_is_said_as_one() -> None:
    one = {**BACK, "way": 1, "times": 5}
    verdict = judge(brought_back(one, one, one, one))
    assert "the way of 1 step was undone" in verdict.message
    assert "the 5th time" in verdict.message


def test_what_begins_alike_in_every_step_is_left_to_its_own_check() -> None:
    history = {"put_back": 3}
    assert list(bad(brought_back(BACK, BACK, BACK, BACK, history=history))) == ["LP401"]
    few = {0: {"put_back": 3}}
    assert list(bad(brought_back(BACK, BACK, BACK, BACK, at=few))) == ["LP409"]


def test_frozen_tensors_are_not_judged() -> None:
    assert judge(brought_back(BACK, BACK, BACK, BACK, slot={"frozen_by_intent": True})).status == "pass"
    assert CHECK.judge(facts()).status == "pending"
