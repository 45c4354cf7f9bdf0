from __future__ import annotations

from typing import Any

from support.facts import ALL, bad, estimator, expect, facts

from lora_probe_callbacks.checks.estimator.untrusted_backend import CHECK, judge

WHY = "the projection of a batch is 1.2, an ordinary backward gives 3.4"


def of(**changes: Any) -> Any:
    return judge(facts(estimators=(estimator(**changes),)))


def test_projection_that_fails_its_comparison_warns() -> None:
    expect(
        of(untrusted=WHY, count=8),
        "warn",
        f"nothing was logged of estimator 'S': {WHY}",
        slots=ALL,
        cause="S",
        got="a projection that fails its comparison with an ordinary backward",
        expected="agreement within rounding",
        fix="pass example_of_row= if the rows of a batch are not its prompts",
        seen=(4, 40),
    )
    assert list(bad(facts(estimators=(estimator(untrusted=WHY),)))) == ["LP901"]


def test_estimate_that_was_computed_passes() -> None:
    expect(of(count=2), "pass", seen=(4, 40))


def test_estimate_that_was_not_computed_is_skipped() -> None:
    expect(of(why_not="batch norm in train mode"), "skipped", "batch norm in train mode", seen=(4, 40))
    expect(CHECK.judge(facts()), "pending", "no estimator was looked at yet")


def test_adapters_that_were_disabled_explain_it() -> None:
    off = facts(modes=("disabled", "disabled"))
    what = facts(estimators=(estimator(untrusted=WHY, forwards=off.forwards, modes=off.modes),))
    assert list(bad(what)) == ["LP102"]


def test_few_prompts_are_left_to_their_own_check() -> None:
    assert list(bad(facts(estimators=(estimator(count=3),)))) == ["LP902"]
