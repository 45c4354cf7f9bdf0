from __future__ import annotations

from support.facts import ALL, bad, expect, facts

from lora_probe_callbacks.checks.activation.nested_adapter import CHECK


def test_adapted_layers_inside_adapted_layers_fail() -> None:
    what = facts(nested=("a", "b", "c", "d"))
    assert list(bad(what)) == ["LP107"]
    words = "4 adapted layers lie inside other adapted layers: a, b, c and 1 more"
    expect(CHECK.judge(what), "fail", words, slots=ALL, cause="nested", got="4 nested adapted layers", expected="0")


def test_peft_model_inside_a_peft_model_fails() -> None:
    verdict = CHECK.judge(facts(rewrapped=("base_model.model",)))
    got = "1 PeftModel inside a PeftModel"
    expect(verdict, "fail", "(base_model.model)", slots=ALL, cause="rewrapped", got=got, expected="one PeftModel")


def test_plain_model_passes() -> None:
    expect(CHECK.judge(facts()), "pass")


def test_tensors_that_the_second_wrap_replaced_are_its_consequence() -> None:
    what = facts(rewrapped=("m",), replaced=(0, 1, 2, 3), slot={"owner": None})
    assert list(bad(what)) == ["LP107"]
