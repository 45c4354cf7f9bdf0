from __future__ import annotations

from support.facts import bad, covered, expect, facts

from lora_probe_callbacks.checks.coverage.frozen_head import CHECK, judge


def test_before_the_first_forward_nothing_is_judged() -> None:
    expect(CHECK.judge(facts()), "pending", "no training forward has begun")
    expect(judge(covered()), "pass")


def test_fresh_head_that_is_frozen_warns_by_itself() -> None:
    what = covered(fresh_heads=("score", "qa"))
    assert list(bad(what)) == ["LP603"]
    expect(
        judge(what),
        "warn",
        "head score, qa looks freshly initialised, is frozen and carries no adapter: nobody trains it",
        cause="score,qa",
        got="weights of the very spread of the initialisation and a bias of zeros, requires_grad=False",
        expected="modules_to_save=['score', 'qa']",
        fix="pass modules_to_save=['score', 'qa'], or the task_type, which adds it",
    )


def test_tie_that_is_broken_is_left_to_its_own_check() -> None:
    assert list(bad(covered(untied=(("lm_head", "embed_tokens"),)))) == ["LP607"]
