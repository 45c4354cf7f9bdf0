from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, MOVED, STILL, Change, bad, expect, facts

from lora_probe_callbacks.checks.update.lost_to_rounding import CHECK

HALF = {"half": True}


def moved(fraction: float) -> Change:
    return MOVED._replace(moved=fraction)


def lost(a: float = 1.0, b: float = 1.0, **changes: Any) -> Any:
    """A and B of 16 bits, of which a step moves these fractions, for three steps."""
    updates = [moved(a), moved(b)] * 2
    history = {"lost": 3}
    return facts(**{"updates": updates, "slot": HALF, "history": history, **changes})


@pytest.mark.parametrize("role", ["A", "B"])
@pytest.mark.parametrize(("fraction", "status"), [(0.19, "fail"), (0.2, "warn"), (0.49, "warn"), (0.5, "pass")])
def test_role_whose_elements_stand_still(role: str, fraction: float, status: str) -> None:
    what = lost(**{role.lower(): fraction})
    verdict = CHECK.judge(what)
    if status == "pass":
        expect(verdict, "pass")
        return
    assert list(bad(what)) == ["LP403"]
    expect(
        verdict,
        status,
        f"the update of lora_{role} is lost to rounding: a step moves {fraction:.1%} of its elements",
        slots=ALL,
        got=f"{fraction:.1%} of the elements of lora_{role} moved",
        expected="nearly all of them",
        cause=role,
        fix="keep the adapter in float32" if status == "warn" else "",
        of_update=True,
    )


def test_role_that_stands_still_comes_before_one_that_hardly_moves() -> None:
    assert CHECK.judge(lost(a=0.4, b=0.1)).cause == "B"
    assert CHECK.judge(lost(a=0.1, b=0.1)).cause == "A"
    assert CHECK.judge(lost(a=0.4, b=0.4)).cause == "A"


def test_large_tensors_count_more() -> None:
    what = lost(updates=[moved(0.1), MOVED, moved(0.9), MOVED], at={2: {"numel": 320}})
    expect(CHECK.judge(what), "pass")
    what = lost(updates=[moved(0.1), MOVED, moved(0.9), MOVED], at={0: {"numel": 320}})
    assert CHECK.judge(what).status == "fail"


def test_three_steps_are_waited_for() -> None:
    words = "10% of the elements of lora_A were moved by the last update; judged once the learning rate no longer rises"
    expect(CHECK.judge(lost(a=0.1, history={"lost": 2})), "pending", words)
    assert CHECK.judge(lost(a=0.1, at={2: {"lost": 2}})).status == "pending"


def test_warm_up_is_waited_for() -> None:
    assert CHECK.judge(lost(a=0.1, at={0: {"rate_rising": True}})).status == "pending"
    assert CHECK.judge(lost(a=0.1, at={1: {"rate_rising": True}})).status == "fail"


def test_only_what_was_lost_is_concerned() -> None:
    assert CHECK.judge(lost(a=0.1, at={1: {"lost": 0}, 2: {"lost": 0}})).slots == {0, 3}


def test_nothing_lost_passes() -> None:
    expect(CHECK.judge(lost(a=0.1, history={"lost": 0})), "pass")
    expect(CHECK.judge(facts(slot=HALF)), "pass")


def test_tensors_that_nobody_stepped_are_not_judged() -> None:
    expect(CHECK.judge(lost(updates=[None] * 4)), "pass")
    assert CHECK.judge(lost(updates=[moved(0.1), MOVED, None, None])).status == "fail"


def test_part_in_float32_is_not_judged() -> None:
    expect(CHECK.judge(lost(a=0.1, at={0: {"half": False}, 2: {"half": False}})), "pass")
    assert CHECK.judge(lost(a=0.1, at={0: {"half": False}})).status == "fail"


def test_empty_shards_are_no_division_by_zero() -> None:
    expect(CHECK.judge(lost(a=0.1, slot={"half": True, "numel": 0})), "pass")


def test_reasons_not_to_judge() -> None:
    expect(CHECK.judge(facts(update=None)), "pending", "no update was seen yet")
    expect(CHECK.judge(facts()), "skipped", "no adapter tensor is stored in 16 bits")
    expect(CHECK.judge(facts(slot={"half": True, "frozen_by_intent": True})), "skipped", "16 bits")


def test_rate_of_zero_is_left_to_its_own_check() -> None:
    history = {"lost": 5, "rate_zero": 5, "had_rate": False, "unmoved": 5}
    assert list(bad(facts(updates=[STILL] * 4, slot={**HALF, "learning_rate": 0.0}, history=history))) == ["LP208"]


def test_b_is_lost_while_a_is_not() -> None:
    verdict = CHECK.judge(lost(b=0.1, at={0: {"lost": 0}, 2: {"lost": 0}}))
    assert (verdict.status, verdict.cause) == ("fail", "B")


def test_first_lost_step_is_pending() -> None:
    what = facts(slot={"half": True}, history={"lost": 1}, updates=[MOVED._replace(moved=0.1)] * 4)
    expect(CHECK.judge(what), "pending", "10% of the elements of lora_A were moved by the last update")
