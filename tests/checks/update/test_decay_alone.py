from __future__ import annotations

import pytest
from support.facts import ALL, MOVED, STILL, ZERO, Change, bad, expect, facts

from lora_probe_callbacks.checks.update.decay_alone import CHECK

DECAYED = {"slot": {"weight_decay": 0.5, "learning_rate": 0.02}, "gradients": [ZERO] * 4}
NEVER = {"zero": 4, "had_signal": False}


@pytest.mark.parametrize("zero", [3, 4])
def test_adapter_moved_by_decay_alone_fails_after_four_steps(zero: int) -> None:
    what = facts(**DECAYED, history={**NEVER, "zero": zero})
    if zero < 4:
        words = "the adapter moves and its gradients are exactly zero in 3 probed step(s)"
        expect(CHECK.judge(what), "pending", words)
        return
    assert list(bad(what)) == ["LP402"]
    expect(
        CHECK.judge(what),
        "fail",
        "the adapter moves by weight decay alone: its gradients are exactly zero since the first step, 4 probed",
        slots=ALL,
        got=f"relative change {0.1 / 1.1:.2e} per step; learning rate times weight decay is 1.00e-02",
        expected="a change that follows a gradient",
    )


def test_a_is_decayed_in_a_healthy_first_step() -> None:
    """While B is zero, A has no gradient, and AdamW moves it all the same."""
    at = {0: NEVER, 2: NEVER}
    expect(CHECK.judge(facts(slot=DECAYED["slot"], at=at)), "pass")


def test_b_that_stands_still_at_zero_is_concerned_too() -> None:
    what = facts(**DECAYED, history=NEVER, updates=[MOVED, STILL, MOVED, MOVED])
    assert CHECK.judge(what).slots == ALL
    what = facts(**DECAYED, history=NEVER, updates=[MOVED, STILL, MOVED, MOVED], at={1: {"zero": 0}})
    assert CHECK.judge(what).slots == {0, 2, 3}


@pytest.mark.parametrize("still", [{"weight_decay": 0.0}, {"learning_rate": 0.0}, {"frozen_by_intent": True}])
def test_without_decay_it_is_left_to_zero_gradient(still: dict[str, object]) -> None:
    what = facts(gradients=[ZERO] * 4, slot={**DECAYED["slot"], **still}, history=NEVER)
    expect(CHECK.judge(what), "pass")


def test_nothing_moved_is_left_to_zero_gradient() -> None:
    what = facts(**DECAYED, updates=[STILL] * 4, history=NEVER)
    expect(CHECK.judge(what), "pass")
    assert list(bad(what)) == ["LP303"]
    expect(CHECK.judge(facts(**DECAYED, updates=[None] * 4, history=NEVER)), "pass")


def test_one_tensor_with_a_signal_passes() -> None:
    expect(CHECK.judge(facts(**DECAYED, history=NEVER, at={3: {"had_signal": True}})), "pass")
    expect(CHECK.judge(facts(**DECAYED, history=NEVER, at={3: {"zero": 0}})), "pass")


def test_shortest_row_decides() -> None:
    assert "in 2 probed" in CHECK.judge(facts(**DECAYED, history=NEVER, at={3: {"zero": 2}})).message


def test_before_an_update_it_is_pending() -> None:
    expect(CHECK.judge(facts(update=None)), "pending", "no update was seen yet")


def test_tensor_that_became_zero_has_no_relative_change() -> None:
    gone = Change(start=1.0, moved=1.0, size=1.0, norm=0.0)
    verdict = CHECK.judge(facts(**DECAYED, history=NEVER, updates=[gone] * 4))
    assert verdict.evidence["got"].startswith("relative change 0.00e+00 per step")


def test_moved_by_gradients_passes() -> None:
    expect(CHECK.judge(facts(slot=DECAYED["slot"])), "pass")


def test_first_step_by_decay_alone_is_pending() -> None:
    verdict = CHECK.judge(
        facts(gradients=[ZERO] * 4, slot={"weight_decay": 0.1}, history={"zero": 1, "had_signal": False})
    )
    expect(verdict, "pending", "the adapter moves and its gradients are exactly zero in 1 probed step(s)")
