from __future__ import annotations

import dataclasses

import pytest
from support.facts import ALL, GRADIENT, NONE, bad, estimator, expect, facts, unread

from lora_probe_callbacks.checks.activation.late_activation import CHECK

ACTIVE = ("active", "active")
SWITCHED = {"modes_at_backward": ("disabled", "disabled")}
MISSING = {"missing": 1, "had_gradient": False, "had_signal": False}


@pytest.mark.parametrize("mode", ["inactive", "disabled"])
def test_activated_after_the_forward_fails(mode: str) -> None:
    what = facts(modes=[mode] * 2, gradients=[NONE] * 4, history=MISSING, forward={"active": ("old",)})
    what = dataclasses.replace(what, modes=ACTIVE)
    assert list(bad(what)) == ["LP105"]
    expect(
        CHECK.judge(what),
        "fail",
        "active adapters were ['old'] in the forward and ['default'] after it",
        slots=ALL,
        cause="activated",
        got=f"{mode} in the forward, active after it",
        expected="active before the forward",
    )


def test_activated_before_the_backward_and_put_back_fails_as_well() -> None:
    what = facts(modes=["inactive"] * 2, forward={"modes_at_backward": ACTIVE})
    assert (CHECK.judge(what).status, CHECK.judge(what).cause) == ("fail", "activated")
    unseen = facts(modes=["inactive"] * 2, forward={"modes_at_backward": None})
    expect(CHECK.judge(unseen), "pass")
    assert CHECK.judge(dataclasses.replace(unseen, modes=ACTIVE)).status == "fail"


def test_only_the_layers_that_changed_are_concerned() -> None:
    what = dataclasses.replace(facts(modes=["inactive", "inactive"]), modes=("inactive", "active"))
    assert CHECK.judge(what).slots == {2, 3}
    what = facts(modes=["inactive", "inactive"], forward={"modes_at_backward": ("inactive", "active")})
    assert CHECK.judge(what).slots == {2, 3}


def test_never_activated_is_left_to_the_neighbours() -> None:
    for mode in ("inactive", "disabled", "merged"):
        expect(CHECK.judge(facts(modes=[mode] * 2)), "pass")


def test_merged_in_the_forward_is_left_to_merged() -> None:
    expect(CHECK.judge(dataclasses.replace(facts(modes=["merged"] * 2), modes=ACTIVE)), "pass")


def test_switched_between_forward_and_backward_fails_where_the_gradients_are_lost() -> None:
    what = facts(gradients=[NONE] * 4, forward=SWITCHED)
    expect(
        CHECK.judge(what),
        "fail",
        "switched between the forward and its backward",
        "then disabled",
        slots=ALL,
        cause="switched",
        got="active in the forward, disabled in the backward",
        expected="the same state until the backward has ended",
        fix="before the training forward, or after backward()",
    )


def test_switched_layers_are_told_apart() -> None:
    what = facts(gradients=[NONE] * 4, forward={"modes_at_backward": ("active", "merged")})
    verdict = CHECK.judge(what)
    assert (verdict.slots, verdict.evidence["got"]) == ({2, 3}, "active in the forward, merged in the backward")


def test_switched_and_the_gradients_arrive_all_the_same_passes() -> None:
    expect(CHECK.judge(facts(forward=SWITCHED)), "pass")
    expect(CHECK.judge(facts(gradients=[NONE, GRADIENT] * 2, forward=SWITCHED)), "pass")


def test_gradients_that_were_not_read_prove_nothing() -> None:
    expect(CHECK.judge(unread(facts(forward=SWITCHED))), "pass")
    expect(CHECK.judge(unread(facts(forward=SWITCHED))), "pass")


def test_switched_in_one_forward_of_two_passes() -> None:
    switched = facts(gradients=[NONE] * 4, forward=SWITCHED)
    unseen = facts(forward={"modes_at_backward": None}).forwards
    expect(CHECK.judge(dataclasses.replace(switched, forwards=switched.forwards + facts().forwards)), "pass")
    expect(CHECK.judge(dataclasses.replace(switched, forwards=switched.forwards + unseen)), "pass")
    inactive = facts(modes=["inactive"] * 2).forwards
    expect(CHECK.judge(dataclasses.replace(switched, forwards=(*switched.forwards, *inactive))), "pass")


def test_no_forward_is_pending_with_its_reason() -> None:
    expect(CHECK.judge(facts(forwards=())), "pending", "no training forward was seen")
    expect(CHECK.judge(facts(forwards=(), unobservable="it is compiled")), "pending", "it is compiled")


def test_estimator_made_before_the_activation_fails() -> None:
    """The bug that this package was born from: S was computed before set_adapter."""
    before = facts(modes=["inactive"] * 2)
    verdict = CHECK.judge(facts(estimators=(estimator(forwards=before.forwards, modes=ACTIVE),)))
    assert (verdict.status, verdict.cause, verdict.seen) == ("fail", "S activated", (4, 40))


def test_active_adapter_passes() -> None:
    expect(CHECK.judge(facts()), "pass")
