from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, ZERO, bad, expect, facts

from lora_probe_callbacks.checks.reachability.dropped_gradient import CHECK, judge
from lora_probe_callbacks.facts import Facts

BLIND = "the graph goes through a reentrant checkpoint"


def behind(*slots: int, packed: tuple[int, int] = (0, 0), blind: str | None = None, **changes: Any) -> Facts:
    return facts(forward={"dropped": frozenset(slots), "why_unknown": blind}, packed=packed, **changes)


def test_packed_weights_before_the_adapter_fail() -> None:
    what = behind(0, 1, packed=(1, 4))
    expect(
        judge(what),
        "fail",
        "1 of 4 4-bit weights are packed for inference",
        "the gradients of 2 adapter tensors lack the part",
        slots=ALL,
        cause="packed",
        got="1 of 4 4-bit weights packed for inference",
        expected="none in training",
        fix="call model.state_dict() after it",
    )
    assert list(bad(what)) == ["LP308"]


@pytest.mark.parametrize(("packed", "status"), [((2, 4), "pending"), ((3, 4), "fail"), ((0, 4), "pending")])
def test_graph_that_cannot_be_walked_fails_if_most_weights_are_packed(packed: tuple[int, int], status: str) -> None:
    verdict = judge(behind(packed=packed, blind=BLIND))
    assert verdict.status == status
    if status == "fail":
        assert "the gradients of 4 adapter tensors" in verdict.message
    else:
        expect(verdict, "pending", BLIND)


def test_packed_weights_behind_which_no_adapter_lies_pass() -> None:
    """In eval mode with gradients the first layers' inputs need none: these few are packed, and harmless."""
    expect(judge(behind(packed=(4, 4))), "pass")


def test_other_operation_without_a_backward_warns() -> None:
    what = behind(0, 1)
    expect(
        judge(what),
        "warn",
        "2 adapter tensors lie behind an operation without a backward",
        slots=[0, 1],
        got="an operation that torch knows no backward of, before 2 tensors",
        expected="operations with a backward",
        fix="if its gradient is meant to be zero nothing is wrong",
    )
    assert list(bad(what)) == ["LP308"]


def test_what_is_meant_to_stay_frozen_may_lie_behind_it() -> None:
    expect(judge(behind(0, at={0: {"frozen_by_intent": True}})), "pass")


def test_forward_without_such_an_operation_passes() -> None:
    expect(judge(facts()), "pass")


def test_step_without_a_training_forward_is_pending() -> None:
    expect(CHECK.judge(facts(forwards=())), "pending", "no training forward was seen in this step")
    compiled = facts(forwards=(), unobservable="compiled as a whole")
    expect(judge(compiled), "pending", "compiled as a whole")


def test_zero_gradients_that_it_explains_are_told_once() -> None:
    what = behind(0, 1, 2, 3, gradients=[ZERO] * 4, history={"zero": 4, "had_signal": False})
    assert list(bad(what)) == ["LP308"]


def test_zero_gradients_by_themselves_are_left_to_their_own_check() -> None:
    assert list(bad(facts(gradients=[ZERO] * 4, history={"zero": 4, "had_signal": False}))) == ["LP303"]
