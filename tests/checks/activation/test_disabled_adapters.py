from __future__ import annotations

import dataclasses

from support.facts import ALL, NONE, bad, estimator, expect, facts

from lora_probe_callbacks.checks.activation.disabled_adapters import CHECK

MISSING = {"missing": 1, "had_gradient": False, "had_signal": False}


def test_disabled_in_the_training_forward_fails() -> None:
    what = facts(modes=["disabled"] * 2, gradients=[NONE] * 4, history=MISSING)
    assert list(bad(what)) == ["LP102"]
    got = "2 of 2 adapted layers disabled in model"
    expect(CHECK.judge(what), "fail", "were disabled", "4 adapter tensors", slots=ALL, got=got, expected="enabled")


def test_no_forward_is_pending_with_its_reason() -> None:
    expect(CHECK.judge(facts(forwards=())), "pending", "no training forward was seen")
    expect(CHECK.judge(facts(forwards=(), unobservable="it is compiled")), "pending", "it is compiled")


def test_reference_forward_beside_the_training_forward_passes() -> None:
    what = facts()
    aside = facts(modes=["disabled"] * 2).forwards
    expect(CHECK.judge(dataclasses.replace(what, forwards=what.forwards + aside)), "pass")


def test_one_of_two_expected_adapters_is_enough() -> None:
    what = facts(modes=["active", "disabled"], expected=("default", "second"))
    what = dataclasses.replace(what, units=(what.units[0], dataclasses.replace(what.units[1], adapter="second")))
    got = "1 of 2 adapted layers disabled in model"
    expect(CHECK.judge(what), "fail", "2 adapter tensors", slots=[2, 3], got=got, expected="enabled")


def test_layers_disabled_in_part_are_left_to_irregular_layers() -> None:
    what = facts(modes=["disabled", "active"])
    expect(CHECK.judge(what), "pass")
    assert list(bad(what)) == ["LP106"]


def test_enabled_after_the_forward_is_left_to_late_activation() -> None:
    what = dataclasses.replace(facts(modes=["disabled"] * 2), modes=("active", "active"))
    expect(CHECK.judge(what), "pass")
    assert list(bad(what)) == ["LP105"]
    half = dataclasses.replace(what, modes=("active", "disabled"))
    assert CHECK.judge(half).status == "fail"


def test_estimators_are_asked_too() -> None:
    disabled = facts(modes=["disabled"] * 2)
    verdict = CHECK.judge(facts(estimators=(estimator(forwards=disabled.forwards, modes=disabled.modes),)))
    assert (verdict.status, verdict.cause, verdict.seen) == ("fail", "S", (4, 40))


def test_active_adapter_passes() -> None:
    expect(CHECK.judge(facts()), "pass")
