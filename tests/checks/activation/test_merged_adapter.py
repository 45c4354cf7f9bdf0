from __future__ import annotations

import dataclasses

from support.facts import ALL, GRADIENT, NONE, bad, estimator, expect, facts

from lora_probe_callbacks.checks.activation.merged_adapter import CHECK

MISSING = {"missing": 1, "had_gradient": False, "had_signal": False}


def test_merged_adapter_is_the_one_finding_of_a_merged_step() -> None:
    """Frozen-looking gradients, an unreachable graph and an unmoved adapter are its consequences."""
    what = facts(modes=["merged"] * 2, gradients=[NONE] * 4, history=MISSING)
    assert list(bad(what)) == ["LP103"]
    got = "merged in 2 of 2 adapted layers"
    expect(CHECK.judge(what), "fail", "was merged", "4 adapter tensors", slots=ALL, got=got, expected="not merged")


def test_nothing_left_of_the_adapter_fails_before_a_forward() -> None:
    what = facts(unloaded=("model",), forwards=())
    words = ("model is a PeftModel without a single adapter tensor", "unloaded")
    evidence = {"got": "0 adapter tensors", "expected": "the adapter that should train"}
    expect(CHECK.judge(what), "fail", *words, cause="unloaded", fix="merge_and_unload() at the very end", **evidence)


def test_no_forward_is_pending_with_its_reason() -> None:
    expect(CHECK.judge(facts(forwards=())), "pending", "no training forward was seen")
    expect(CHECK.judge(facts(forwards=(), unobservable="it is compiled")), "pending", "it is compiled")


def test_a_part_that_is_merged_is_left_to_the_check_of_irregular_layers() -> None:
    what = facts(modes=["merged", "active"])
    assert list(bad(what)) == ["LP106"]
    expect(CHECK.judge(what), "pass")


def test_merged_beside_a_modules_to_save_copy_is_merged_not_irregular() -> None:
    what = facts(modes=["merged", "active"], gradients=[NONE] * 2 + [GRADIENT] * 2)
    copy = dataclasses.replace(what.units[1], lora=False)
    what = dataclasses.replace(what, units=(what.units[0], copy))
    assert list(bad(what)) == ["LP103"]
    got = "merged in 1 of 2 adapted layers"
    expect(CHECK.judge(what), "fail", "2 adapter tensors", slots=[0, 1], got=got, expected="not merged")


def test_one_merged_forward_of_several_is_enough() -> None:
    what = facts()
    merged = facts(modes=["merged"] * 2).forwards
    assert CHECK.judge(dataclasses.replace(what, forwards=what.forwards + merged)).status == "fail"


def test_estimators_are_asked_too() -> None:
    merged = facts(modes=["merged"] * 2)
    what = facts(estimators=(estimator(forwards=merged.forwards, modes=merged.modes),))
    expect(
        CHECK.judge(what),
        "fail",
        "at the forward of estimator 'S': the adapter was merged",
        slots=ALL,
        got="merged in 2 of 2 adapted layers",
        expected="not merged",
        cause="S",
        seen=(4, 40),
    )


def test_active_adapter_passes() -> None:
    assert not bad(facts())
    expect(CHECK.judge(facts(estimators=(estimator(),))), "pass")
