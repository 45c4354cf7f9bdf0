from __future__ import annotations

from typing import Any

import pytest
from support.facts import bad, estimator, expect, facts

from lora_probe_callbacks.checks.estimator.no_signal import CHECK, judge
from lora_probe_callbacks.checks.estimator.too_few_prompts import FEW

SEEN = (4, 40)


def of(*recent: tuple[float, float], **changes: Any) -> Any:
    return judge(facts(estimators=(estimator(**{"count": 8, "recent": recent, **changes}),)))


def test_eight_estimates_of_noise_warn() -> None:
    recent = ((0.1, 1.0), (-0.1, 1.0)) * 3 + ((0.25, 1.0), (-2.0, 1.0))
    expect(
        of(*recent),
        "warn",
        "the last 8 estimates of 'S' cannot be told from 0, one by one or together",
        cause="S",
        got="delta_1 within 2 standard errors of 0 in 8 of 8; their sum -1.8, with a standard error of 3",
        expected="a signal above the noise in some, or in their sum",
        fix="if no change is expected nothing is wrong; else take more prompts",
        seen=SEEN,
    )
    assert list(bad(facts(estimators=(estimator(count=8, recent=recent),)))) == ["LP903"]


def test_seven_estimates_are_pending() -> None:
    words = "7 estimate(s) within 2 standard errors of 0, of 8 that are looked at together"
    expect(of(*[(0.1, 1.0)] * 7), "pending", words, seen=SEEN)


@pytest.mark.parametrize("delta", [2.01, -2.01])
def test_single_estimate_above_the_noise_passes(delta: float) -> None:
    expect(of((delta, 1.0), *[(0.0, 1.0)] * 7), "pass", seen=SEEN)
    assert of((delta, 1.0)).status == "pass"


@pytest.mark.parametrize(("sign", "delta"), [(1, 0.71), (-1, 0.71), (1, 0.70), (-1, 0.70)])
def test_sum_above_its_own_noise_passes(sign: int, delta: float) -> None:
    """The standard error of a sum of eight is the root of eight: their mean needs 0.707 of one."""
    assert of(*[(sign * delta, 1.0)] * 8).status == ("pass" if delta > 0.705 else "warn")


def test_two_errors_exactly_are_still_noise() -> None:
    assert of(*[(2.0, 1.0), (-2.0, 1.0)] * 4).status == "warn"
    assert of(*[(1.0, 1.0)] * 4, *[(0.0, 0.0)] * 4).status == "warn"  # 4 within 2 * 2
    assert of(*[(0.4, 0.5)] * 8).status == "pass"  # 3.2 above 2 * 1.41: squares add up


@pytest.mark.parametrize(("count", "status"), [(None, "skipped"), (FEW - 1, "skipped"), (FEW, "warn")])
def test_few_prompts_are_left_to_their_own_check(count: int | None, status: str) -> None:
    noise = [(0.1, 1.0), (-0.1, 1.0)] * 4
    assert of(*noise, count=count).status == status
    if count == FEW - 1:
        assert list(bad(facts(estimators=(estimator(count=count, recent=tuple(noise)),)))) == ["LP902"]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sign_that_is_sure_over_the_run_passes(sign: int) -> None:
    noise = [(0.1, 1.0), (-0.1, 1.0)] * 4
    assert of(*noise).status == "warn"
    assert of(*noise, sure=sign).status == "pass"


def test_a_heavy_tail_is_said() -> None:
    verdict = of(*[(0.1, 1.0), (-0.1, 1.0)] * 4, tail="one prompt makes 90% of the spread")
    assert "at the last look one prompt makes 90% of the spread" in str(verdict)


def test_no_estimator_is_pending() -> None:
    expect(CHECK.judge(facts()), "pending", "no estimator was looked at yet")


def test_estimator_whose_gradients_are_zero_is_left_to_its_own_check() -> None:
    assert "LP305" in CHECK.explained_by
