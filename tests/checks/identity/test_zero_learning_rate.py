from __future__ import annotations

import pytest
from support.facts import ALL, STILL, bad, expect, facts

from lora_probe_callbacks.checks.identity.zero_learning_rate import CHECK

ZERO_RATE = {"learning_rate": 0.0}


def never(row: int) -> dict[str, object]:
    return {"rate_zero": row, "had_rate": False}


def test_rate_of_zero_since_the_first_step_fails_after_four() -> None:
    what = facts(slot=ZERO_RATE, history=never(4))
    expect(
        CHECK.judge(what),
        "fail",
        "the learning rate is exactly 0 since the first step, 4 probed steps now",
        slots=ALL,
        got="lr = 0.0 in 4 probed steps in a row",
        expected="lr > 0 after the warm-up",
    )
    expect(
        CHECK.judge(facts(slot=ZERO_RATE, history=never(3))), "pending", "the learning rate is 0 in 3 probed step(s)"
    )


def test_rate_that_was_above_zero_warns() -> None:
    expect(
        CHECK.judge(facts(slot=ZERO_RATE, history={"rate_zero": 5})),
        "warn",
        "the learning rate of all adapter tensors is exactly 0 for 5 probed steps in a row",
        slots=ALL,
        got="lr = 0.0 in 5 probed steps in a row",
        expected="lr > 0 after the warm-up",
        fix="if the schedule is meant to end or pause here nothing is wrong",
    )


def test_part_with_a_rate_of_zero_warns() -> None:
    what = facts(at={0: never(6), 2: never(4), 3: never(3)})
    verdict = CHECK.judge(what)
    expect(
        verdict,
        "warn",
        "the learning rate of layer.0.lora_A, layer.1.lora_A is exactly 0 for 6 probed steps",
        slots=[0, 2],
        got="lr = 0.0 in 6 probed steps in a row",
        expected="lr > 0 after the warm-up",
        fix="look at its length in optimizer steps",
    )


def test_longest_row_is_told_while_pending() -> None:
    assert "in 3 probed" in CHECK.judge(facts(at={0: never(3), 1: never(1)})).message


def test_nobody_owns_the_adapter() -> None:
    expect(CHECK.judge(facts(slot={"owner": None, "learning_rate": None})), "pending", "no optimizer owns the adapter")


def test_before_the_first_step() -> None:
    expect(CHECK.judge(facts(history=never(0))), "pending", "no step was seen yet")
    expect(CHECK.judge(facts(history=never(0), at={3: {"had_rate": True}})), "pass")


def test_tensors_without_an_owner_do_not_soften_the_verdict() -> None:
    what = facts(history=never(4), slot=ZERO_RATE, at={0: {"owner": None, "learning_rate": None}})
    assert (CHECK.judge(what).status, CHECK.judge(what).slots) == ("fail", {1, 2, 3})


@pytest.mark.parametrize("rate", [1e-3, 1e-30])
def test_rate_above_zero_passes(rate: float) -> None:
    expect(CHECK.judge(facts(slot={"learning_rate": rate})), "pass")


def test_unmoved_tensors_are_its_consequence() -> None:
    what = facts(updates=[STILL] * 4, slot=ZERO_RATE, history={**never(5), "unmoved": 4})
    assert list(bad(what)) == ["LP208"]


def test_frozen_by_intent_passes() -> None:
    assert CHECK.judge(facts(history=never(9), slot={"frozen_by_intent": True})).status == "pending"


def test_first_step_with_a_rate_of_zero_is_pending() -> None:
    verdict = CHECK.judge(facts(history={"rate_zero": 1, "had_rate": True}))
    expect(verdict, "pending", "the learning rate is 0 in 1 probed step(s): a warm-up may begin so")
