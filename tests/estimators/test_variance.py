from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_probe_callbacks.estimators import (
    ConditionalVariance,
    conditional_variance,
    first_order_change,
    t_interval,
    u_statistic_variance,
)


def far_from_zero(count: int, seed: int = 0) -> torch.Tensor:
    """Draw numbers whose mean is a million times their spread."""
    generator = torch.Generator().manual_seed(seed)
    return 1e6 + torch.randn(count, generator=generator, dtype=torch.float64)


def exact_moments(s: torch.Tensor) -> tuple[float, float, float]:
    """Mean, sample variance and standard error; the standard library sums in rational numbers."""
    values = s.tolist()
    variance = statistics.variance(values)
    return statistics.mean(values), variance, math.sqrt(variance / len(values))


def assert_moments(metric: ConditionalVariance, s: torch.Tensor, rel: float) -> None:
    mean, variance, standard_error, count = metric.compute()
    assert count.item() == len(s)
    assert [x.item() for x in (mean, variance, standard_error)] == pytest.approx(exact_moments(s), rel=rel, abs=0)


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 1),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_merging_micro_batches_equals_one_exact_pass(sizes, seed):
    s = far_from_zero(sum(sizes), seed)
    metric = ConditionalVariance()
    for part in s.split(sizes):
        metric.update(part)
    assert_moments(metric, s, rel=1e-12)


def test_merging_keeps_its_digits_over_many_micro_batches():
    s = far_from_zero(3000)
    metric = ConditionalVariance()
    for part in s.split(3):
        metric.update(part)
    assert_moments(metric, s, rel=1e-12)


def test_two_metrics_merge_into_one():
    s = far_from_zero(50)
    a, b = ConditionalVariance(), ConditionalVariance()
    a.update(s[:11])
    b.update(s[11:])
    a.merge_state(b)
    assert_moments(a, s, rel=1e-12)


def test_merging_with_a_metric_that_saw_nothing_changes_nothing():
    s = far_from_zero(5)
    a, b = ConditionalVariance(), ConditionalVariance()
    a.update(s)
    expected = a.compute()
    a.merge_state(b)
    assert a.compute() == expected


def test_calling_the_metric_returns_the_moments_of_that_batch_and_accumulates():
    s = far_from_zero(9)
    metric = ConditionalVariance()
    metric.update(s[:4])
    own = metric(s[4:])
    assert own.variance.item() == pytest.approx(exact_moments(s[4:])[1], rel=1e-12)
    assert_moments(metric, s, rel=1e-12)


def test_calling_the_metric_with_one_prompt_is_refused_and_loses_nothing():
    s = far_from_zero(4)
    metric = ConditionalVariance()
    metric.update(s)
    with pytest.raises(ValueError, match=r"got s of shape \[1\], expected \[B\] with B >= 2"):
        metric(s[:1])
    assert_moments(metric, s, rel=1e-12)


def test_float32_projections_are_accumulated_in_float64():
    s = torch.tensor([1.0, 1.0 + 2**-20, 1.0 - 2**-20])
    metric = ConditionalVariance()
    metric.update(s)
    assert metric.compute().variance.item() == 2.0**-40


def test_reset_forgets():
    metric = ConditionalVariance()
    metric.update(far_from_zero(4))
    metric.reset()
    metric.update(torch.tensor([1.0, 3.0]))
    assert metric.compute().mean.item() == 2.0
    assert metric.compute().count.item() == 2


def test_the_first_order_change_and_its_variance_are_their_formulas():
    s, scale = torch.tensor([1.0, 4.0, -2.0, 3.0]), -0.5
    assert first_order_change(s, scale).item() == -0.75
    assert conditional_variance(s, scale).item() == pytest.approx(0.25 * (0.25 + 6.25 + 12.25 + 2.25) / 3 / 4)


@pytest.mark.parametrize("B", [4, 8, 32])
def test_the_conditional_interval_covers_the_truth(B):
    draws = 20_000
    s = 0.3 + 2.0 * torch.randn(draws, B, generator=torch.Generator().manual_seed(B), dtype=torch.float64)
    mean = torch.stack([first_order_change(row, 0.1) for row in s])
    standard_error = torch.stack([conditional_variance(row, 0.1) for row in s]).sqrt()
    low, high = t_interval(mean, standard_error, B)
    coverage = ((low <= 0.03) & (high >= 0.03)).double().mean().item()
    assert 0.945 <= coverage <= 0.955


def test_the_interval_is_students_for_any_shape_of_count():
    low, high = t_interval(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([4, 1000]))
    assert (high - 1.0).tolist() == pytest.approx([3.182446, 2 * 1.962341], rel=1e-6)
    assert (low + high).tolist() == pytest.approx([2.0, 2.0])
    narrow = t_interval(0.0, 1.0, 11, confidence=0.5)
    assert narrow[1].item() == pytest.approx(0.699812, rel=1e-5)


def test_the_two_way_variance_is_its_formula():
    torch.manual_seed(0)
    X, Y = torch.randn(5, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    V_X = sum(((x - X.mean(0)) @ Y.mean(0)).square() for x in X) / (5 * 4)
    V_Y = sum(((y - Y.mean(0)) @ X.mean(0)).square() for y in Y) / (3 * 2)
    result = u_statistic_variance(X @ Y.mean(0), Y @ X.mean(0), scale=-0.1)
    assert result.V_X.item() == pytest.approx(V_X.item(), rel=1e-12)
    assert result.V_Y.item() == pytest.approx(V_Y.item(), rel=1e-12)
    assert result.standard_error.item() == pytest.approx(0.1 * math.sqrt(V_X + V_Y), rel=1e-12)


@pytest.mark.parametrize(("signal", "low", "high"), [(0.0, 1.9, 2.1), (5.0, 0.95, 1.1)])
def test_the_two_way_variance_is_conservative_by_at_most_two(signal, low, high):
    # 100 dimensions, B = 6: without signal all of the variance is interaction, with much signal almost none.
    draws, generator = 4000, torch.Generator().manual_seed(1)
    X = signal + torch.randn(draws, 6, 100, generator=generator, dtype=torch.float64)
    Y = signal + torch.randn(draws, 6, 100, generator=generator, dtype=torch.float64)
    mu_X, mu_Y = X.mean(1), Y.mean(1)
    true = (mu_X * mu_Y).sum(1).var().item()
    s_X, s_Y = (X @ mu_Y[:, :, None])[..., 0], (Y @ mu_X[:, :, None])[..., 0]
    parts = [u_statistic_variance(a, b, 1.0) for a, b in zip(s_X, s_Y, strict=True)]
    estimated = torch.stack([part.V_X + part.V_Y for part in parts]).mean().item()
    assert low <= estimated / true <= high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: conditional_variance(torch.ones(1), 1.0),
            r"got s of shape \[1\], expected \[B\] with B >= 2",
        ),
        (lambda: u_statistic_variance(torch.ones(3), torch.ones(1), 1.0), r"got s of shape \[1\]"),
        (lambda: first_order_change(torch.ones(0), 1.0), r"got s of shape \[0\]"),
        (lambda: first_order_change(torch.ones(2, 2), 1.0), r"got s of shape \[2, 2\]"),
        (lambda: ConditionalVariance().update(torch.ones(0)), r"got s of shape \[0\]"),
        (
            lambda: first_order_change(torch.tensor([1.0, float("nan"), 2.0]), 1.0),
            r"got s with 1 of 3 entries not finite, the first at prompts \[1\]",
        ),
        (lambda: t_interval(0.0, 1.0, 1), "got count=1, expected at least 2 prompts"),
        (lambda: t_interval(0.0, 1.0, 4, confidence=95), "got confidence=95, expected a probability"),
    ],
)
def test_what_has_no_variance_is_a_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_prompt_in_all_has_no_variance():
    metric = ConditionalVariance()
    metric.update(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="got 1 prompts, expected at least 2"):
        metric.compute()
