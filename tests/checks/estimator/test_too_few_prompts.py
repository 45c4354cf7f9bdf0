from __future__ import annotations

import pytest
from support.facts import bad, estimator, expect, facts

from lora_probe_callbacks.checks.estimator.too_few_prompts import CHECK, judge


@pytest.mark.parametrize(("count", "interval"), [(1, "12.7"), (2, "12.7"), (3, "4.3")])
def test_up_to_three_prompts_warn(count: int, interval: str) -> None:
    what = facts(estimators=(estimator(count=count),))
    expect(
        judge(what),
        "warn",
        f"estimator 'S' rests on {count} prompts: its interval at 95% is {interval} standard errors to each side",
        cause="S",
        got=f"{count} prompts in an E-batch",
        expected="4 at least, better 8 or more",
        fix="give it larger batches",
        seen=(4, 40),
    )
    assert list(bad(what)) == ["LP902"]


def test_four_prompts_pass() -> None:
    expect(judge(facts(estimators=(estimator(count=4),))), "pass", seen=(4, 40))


def test_worst_of_several_estimators_has_the_say() -> None:
    what = facts(estimators=(estimator(count=8), estimator(name="T", count=2)))
    assert (judge(what).status, judge(what).cause) == ("warn", "T")


def test_estimator_that_was_not_computed_is_skipped() -> None:
    expect(judge(facts(estimators=(estimator(why_not="one prompt"),))), "skipped", "one prompt", seen=(4, 40))
    expect(CHECK.judge(facts()), "pending", "no estimator was looked at yet")


def test_estimator_without_gradients_is_left_to_its_own_check() -> None:
    what = facts(estimators=(estimator(count=8, forwards=(), without_grad=1, graph=False, reached=None),))
    assert "LP902" not in bad(what)
