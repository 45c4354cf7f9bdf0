from __future__ import annotations

from support.facts import ALL, bad, expect, facts

from lora_probe_callbacks.checks.update.stale_forward import CHECK


def test_forward_that_does_not_see_the_parameters_fails() -> None:
    what = facts(stale_forward=(True, "outputs differ by up to 1.00e-02"))
    assert list(bad(what)) == ["LP405"]
    words = "the forward does not see the present parameters"
    got = "outputs differ by up to 1.00e-02"
    expect(CHECK.judge(what), "fail", words, slots=ALL, got=got, expected="bit-equal outputs")


def test_bit_equal_repeat_passes() -> None:
    expect(CHECK.judge(facts(stale_forward=(False, "1 outputs bit-equal"))), "pass")


def test_reasons_not_to_judge() -> None:
    expect(CHECK.judge(facts()), "pending", "no forward was repeated yet")
    expect(CHECK.judge(facts(why_not_repeated="outside autocast")), "skipped", "outside autocast")


def test_unmoved_adapter_is_left_to_the_neighbour() -> None:
    assert list(bad(facts(stale_forward=(False, "equal"), history={"unmoved": 4}))) == ["LP401"]
