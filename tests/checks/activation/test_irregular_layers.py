from __future__ import annotations

import dataclasses

from support.facts import bad, estimator, expect, facts

from lora_probe_callbacks.checks.activation.irregular_layers import CHECK

SAME = "the same state in all layers"


def test_adapter_active_in_some_layers_only_fails() -> None:
    what = facts(modes=["active", "disabled"])
    assert list(bad(what)) == ["LP106"]
    words = "adapter 'default' is active in 1 of its 2 layers and disabled in 1"
    expect(CHECK.judge(what), "fail", words, slots=[2, 3], cause="default", got="disabled: layer.1", expected=SAME)


def test_several_states_are_all_named() -> None:
    what = facts(units=5, modes=["merged", "active", "inactive", "active", "inactive"])
    expect(
        CHECK.judge(what),
        "fail",
        "active in 2 of its 5 layers and inactive or merged in 3",
        slots=[0, 1, 4, 5, 8, 9],
        cause="default",
        got="inactive or merged: layer.0, layer.2, layer.4",
        expected=SAME,
    )


def test_no_forward_is_pending_with_its_reason() -> None:
    expect(CHECK.judge(facts(forwards=())), "pending", "no training forward was seen")
    expect(CHECK.judge(facts(forwards=(), unobservable="it is compiled")), "pending", "it is compiled")


def test_whole_adapter_in_one_state_is_left_to_the_neighbours() -> None:
    for mode in ("active", "disabled", "inactive", "merged"):
        expect(CHECK.judge(facts(modes=[mode] * 2)), "pass")


def test_other_adapter_in_other_layers_is_no_irregularity() -> None:
    what = facts(modes=["active", "inactive"], expected=("default", "second"))
    what = dataclasses.replace(what, units=(what.units[0], dataclasses.replace(what.units[1], adapter="second")))
    expect(CHECK.judge(what), "pass")


def test_merged_in_one_of_two_forwards_counts_as_merged() -> None:
    what = facts()
    part = facts(modes=["merged", "active"]).forwards
    verdict = CHECK.judge(dataclasses.replace(what, forwards=part + what.forwards))
    assert (verdict.status, verdict.slots) == ("fail", {0, 1})


def test_estimators_are_asked_too() -> None:
    part = facts(modes=["active", "disabled"])
    verdict = CHECK.judge(facts(estimators=(estimator(forwards=part.forwards, modes=part.modes),)))
    assert (verdict.status, verdict.cause, verdict.seen) == ("fail", "S default", (4, 40))
