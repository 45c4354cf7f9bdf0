from __future__ import annotations

from support.facts import bad, expect, facts

from lora_probe_callbacks.checks.identity.trainable_base import CHECK


def test_base_weight_that_requires_gradients_fails() -> None:
    what = facts(trainable_bases=("a", "b"))
    assert list(bad(what)) == ["LP206"]
    words = "the base weights of 2 adapted layers are trainable: a, b; what they learn is not in the adapter file"
    expect(CHECK.judge(what), "fail", words, got="2 base weights with requires_grad=True", expected="0")


def test_frozen_base_passes() -> None:
    expect(CHECK.judge(facts()), "pass")


def test_base_that_trains_and_moves_is_one_finding() -> None:
    from lora_probe_callbacks.facts import BaseDrift

    what = facts(trainable_bases=("a",), base_drift=BaseDrift(0.5, "a", 0, quantised=False))
    assert list(bad(what)) == ["LP206"]
