from __future__ import annotations

from support.facts import bad, covered, expect, facts

from lora_probe_callbacks.checks.coverage.untied_copy import CHECK, judge


def test_before_the_first_forward_nothing_is_judged() -> None:
    expect(CHECK.judge(facts()), "pending", "no training forward has begun")
    expect(judge(covered()), "pass")


def test_copy_of_one_of_two_tied_tables_warns_by_itself() -> None:
    what = covered(untied=(("lm_head", "embed_tokens"), ("second", "third")))
    assert list(bad(what)) == ["LP607"]
    expect(
        judge(what),
        "warn",
        "lm_head is trained as a copy of its own, and embed_tokens, which is tied to it in the base model, stays as ",
        cause="tie",
        got="one of two tied tables in modules_to_save",
        expected="both, and tied, or neither",
        fix="pass ensure_weight_tying=True in the LoraConfig",
    )


def test_head_that_nobody_trains_is_left_to_its_own_check() -> None:
    assert list(bad(covered(fresh_heads=("score",)))) == ["LP603"]
