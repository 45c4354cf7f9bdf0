from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
from support.facts import MOVED, STILL, Change, bad, expect, facts, received

from lora_probe_callbacks.checks.update.erased import CHECK, judge

ERASED = Change(start=1.0, moved=1.0, size=1.0, norm=0.01)


def test_every_b_erased_fails() -> None:
    three_four = [
        ERASED._replace(start=3.0, norm=0.03, size=3.0),
        ERASED._replace(start=4.0, norm=0.04, size=4.0),
    ]
    what = facts(updates=[STILL, three_four[0], STILL, three_four[1]])
    expect(
        judge(what),
        "fail",
        "one step erased the adapter: the norm of B fell from 5 to 0.05 in all 2 adapted layers, "
        "layer.0.lora_B, layer.1.lora_B",
        slots=[1, 3],
        got="a change of 5 at a learning rate of 0.001",
        expected="a change of the size of rate and gradient",
        of_update=True,
    )
    assert list(bad(what)) == ["LP407"]


@pytest.mark.parametrize(
    ("update", "slot", "status"),
    [
        (ERASED._replace(norm=0.1), {}, "pass"),  # a tenth is left
        (ERASED._replace(norm=0.099), {}, "fail"),
        (ERASED._replace(start=2.0, norm=0.199), {}, "fail"),
        (ERASED._replace(norm=float("nan")), {}, "pass"),  # LP501
        (ERASED._replace(start=0.0), {}, "pending"),  # there was nothing to erase
        (ERASED._replace(start=0.5), {}, "fail"),
        (ERASED, {"learning_rate": 0.02}, "pass"),  # 10 * 0.02 * sqrt(32) is above 1
        (ERASED, {"learning_rate": 0.017}, "fail"),
        (ERASED, {"learning_rate": 0.01, "weight_decay": 50.0}, "pass"),
        (ERASED, {"learning_rate": 0.01, "weight_decay": 9.9}, "fail"),
        (ERASED, {"learning_rate": 0.01, "weight_decay": 10.0}, "pass"),  # a change of exactly ten times that
        (ERASED, {"learning_rate": None}, "pass"),
        (ERASED, {"learning_rate": float("nan")}, "pass"),
        (ERASED, {"weight_decay": None}, "fail"),
        (ERASED, {"frozen_by_intent": True}, "pending"),
    ],
)
def test_change_that_something_explains_passes(update: Change, slot: dict[str, Any], status: str) -> None:
    assert judge(facts(updates=[STILL, update] * 2, slot=slot)).status == status


def test_tensor_without_weight_decay_is_not_decayed() -> None:
    two = Change(start=2.0, moved=1.0, size=2.0, norm=0.001)
    slot = {"learning_rate": 0.15, "weight_decay": None, "numel": 1}
    assert judge(facts(updates=[STILL, two] * 2, slot=slot)).status == "fail"


def test_first_two_names_are_given() -> None:
    verdict = judge(facts(units=3, updates=[STILL, ERASED] * 3))
    assert verdict.message.endswith("in all 3 adapted layers, layer.0.lora_B, layer.1.lora_B and 1 more")


def test_weight_decay_is_of_what_there_was() -> None:
    half = Change(start=0.5, moved=1.0, size=0.5, norm=0.001)
    slot = {"learning_rate": 0.01, "weight_decay": 50.0, "numel": 1}
    assert judge(facts(updates=[STILL, half] * 2, slot=slot)).status == "pass"
    slot["learning_rate"] = 0.001  # ten times 0.001 * 50 * 0.5 is below the change
    assert judge(facts(updates=[STILL, half] * 2, slot=slot)).status == "fail"


@pytest.mark.parametrize(("norm", "status"), [(99.0, "fail"), (101.0, "pass"), (None, "fail")])
def test_gradient_that_explains_the_change_passes(norm: float | None, status: str) -> None:
    """SGD steps by the rate times the gradient."""
    what = facts(updates=[STILL, ERASED] * 2)
    assert judge(received(what, 1e9, norm, 1e9, norm)).status == status
    assert judge(received(what, None, None, None, None)).status == "fail"


def test_a_alone_does_not_tell() -> None:
    expect(judge(facts(updates=[ERASED, MOVED] * 2)), "pass")
    assert judge(facts(updates=[ERASED, STILL] * 2)).status == "pass"


def test_one_layer_erased_of_two_passes() -> None:
    assert judge(facts(updates=[STILL, ERASED, STILL, STILL])).status == "pass"


def test_layer_that_was_not_stepped_or_was_zero_is_left_out() -> None:
    assert judge(facts(updates=[None, ERASED, None, None])).slots == {1}
    zero = ERASED._replace(start=0.0)
    assert judge(facts(updates=[STILL, zero, STILL, ERASED])).slots == {3}
    assert judge(facts(updates=[STILL, ERASED] * 2, at={1: {"frozen_by_intent": True}})).slots == {3}


def test_what_cannot_be_judged_says_why() -> None:
    expect(CHECK.judge(facts(update=None)), "pending", "no update was seen yet")
    expect(judge(facts(updates=[None] * 4)), "pending", "no B has a value that a step could erase")


def test_values_that_are_not_finite_are_left_to_their_own_check() -> None:
    broken = ERASED._replace(norm=float("nan"))
    assert list(bad(facts(updates=[broken] * 4))) == ["LP501"]


@pytest.mark.parametrize(("gradient", "status"), [(math.inf, "pass"), (math.nan, "fail"), (1.0, "fail")])
def test_infinite_gradient_explains_every_change(gradient: float, status: str) -> None:
    what = facts(updates=[STILL, ERASED] * 2, slot={"learning_rate": 0.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert judge(received(what, *[gradient] * 4)).status == status
