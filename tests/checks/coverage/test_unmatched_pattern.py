from __future__ import annotations

from support.facts import bad, covered, expect, facts

from lora_probe_callbacks.checks.coverage.unmatched_pattern import CHECK, judge
from lora_probe_callbacks.facts import (
    Request,
)


def test_before_the_first_forward_nothing_is_judged() -> None:
    expect(CHECK.judge(facts()), "pending", "no training forward has begun")
    expect(judge(covered()), "pass")


def test_key_that_matches_nothing_warns_by_itself() -> None:
    patterns = (("rank_pattern", "q_porj"), ("alpha_pattern", "v_porj"), ("rank_pattern", "k_porj"))
    what = covered(patterns=patterns)
    assert list(bad(what)) == ["LP602"]
    expect(
        judge(what),
        "warn",
        "rank_pattern has 'q_porj', 'k_porj', which no adapted module matches: they have the default",
        cause="rank_pattern",
        got="2 keys of rank_pattern without a module",
        expected="the end of a name, or a regular expression that matches it to its end",
        fix="compare the keys with model.targeted_module_names",
    )


def test_target_that_matches_nothing_is_left_to_its_own_check() -> None:
    assert list(bad(covered(unmet=(Request("default", "target_modules", "q_porj", exists=False),)))) == ["LP601"]
