"""Intervals for skewed s_n, and the sequence that holds at all looks together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lora_probe_callbacks.estimators import SignSequence, skewed_interval, spread
from lora_probe_callbacks.estimators.intervals import hall_and_t


@pytest.mark.parametrize(
    ("kind", "at_least", "at_most"),
    [("gaussian", 0.94, 0.975), ("lognormal", 0.92, 0.95), ("zeros", 0.94, 0.975)],
)
def test_coverage_at_16(kind: str, at_least: float, at_most: float) -> None:
    rng = np.random.default_rng(0)
    x = {
        "gaussian": lambda: rng.normal(size=(4000, 16)),
        "lognormal": lambda: rng.lognormal(0, 1, (4000, 16)) - math.exp(0.5),
        "zeros": lambda: (rng.random((4000, 16)) < 0.3) * rng.normal(1, 1, (4000, 16)) - 0.3,
    }[kind]()
    lower, upper = hall_and_t(x, float(stats.t.ppf(0.975, 15)))
    assert at_least <= ((lower <= 0) & (upper >= 0)).mean() <= at_most


def test_it_is_students_t_where_nothing_is_skewed() -> None:
    s = torch.linspace(-1, 1, 16, dtype=torch.float64)
    half = stats.t.ppf(0.975, 15) * float(s.std()) / 4
    assert skewed_interval(s) == pytest.approx((-half, half), rel=1e-4)


def test_it_reaches_further_to_the_side_of_the_tail() -> None:
    s = torch.tensor([0.0, 0.1, 0.2, 0.1, 0.0, 0.1, 3.0, 0.2])
    lower, upper = skewed_interval(s)
    mean = float(s.mean())
    assert upper - mean > mean - lower > 0
    mirrored = skewed_interval(s, scale=-2.0)
    assert mirrored == pytest.approx((-2 * upper, -2 * lower))
    assert skewed_interval(s, scale=0.0) == (0.0, 0.0)
    wide, narrow = skewed_interval(s, confidence=0.99), skewed_interval(s, confidence=0.8)
    assert wide[0] < lower < narrow[0] < narrow[1] < upper < wide[1]


def test_equal_values_say_nothing() -> None:
    assert skewed_interval(torch.zeros(8)) == (-math.inf, math.inf)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="B >= 3"):
        skewed_interval(torch.ones(2))
    with pytest.raises(ValueError, match="confidence=1"):
        skewed_interval(torch.ones(4), confidence=1.0)
    with pytest.raises(ValueError, match="confidence=0"):
        SignSequence(0.0)


def test_spread() -> None:
    tail = spread(torch.tensor([0.0, 0.0, 0.0, 10.0]))
    assert tail.zeros == 0.75
    assert tail.skewness == pytest.approx(float(stats.skew([0, 0, 0, 10], bias=True)) * 16 / 6 / (4 / 3) ** 1.5)
    assert tail.largest == pytest.approx(7.5**2 / (7.5**2 + 3 * 2.5**2))
    assert tail.heavy == "one prompt makes 75% of the spread"
    assert spread(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, -1.0])).heavy == "67% of the prompts are exactly zero"
    assert spread(torch.randn(64, generator=torch.Generator().manual_seed(0))).heavy is None
    assert math.isnan(spread(torch.zeros(4)).largest)


class TestSequence:
    @pytest.mark.parametrize("kind", ["gaussian", "lognormal"])
    def test_a_true_zero_is_rarely_called(self, kind: str) -> None:
        rng = np.random.default_rng(1)
        called = 0
        for _ in range(150):
            x = rng.normal(size=(1000, 8)) if kind == "gaussian" else rng.lognormal(0, 1, (1000, 8)) - math.exp(0.5)
            sequence = SignSequence()
            for mean, error in zip(x.mean(1).tolist(), (x.std(1, ddof=1) / 8**0.5).tolist(), strict=True):
                sequence.add(mean, error)
            called += sequence.sure != 0
        assert called <= 15  # 5% and three standard errors

    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_signal_is_called_by_its_sign(self, sign: int) -> None:
        sequence = SignSequence()
        for _ in range(100):
            sequence.add(sign * 1e-6, 1e-6)
        assert sequence.sure == sign
        lower, upper = sequence.interval
        assert lower < sign * 1e-6 < upper
        assert lower > 0 if sign > 0 else upper < 0

    def test_the_first_looks_set_the_weight_alone(self) -> None:
        sequence = SignSequence()
        for _ in range(8):
            sequence.add(100.0, 1.0)
        assert sequence.interval == (-math.inf, math.inf)
        assert not sequence.sure

    def test_the_weights_follow_the_scale(self) -> None:
        """A learning rate that falls by 1000: without weights, the late looks would not count."""
        sequence = SignSequence()
        rng = np.random.default_rng(0)
        for t in range(400):
            scale = 1.0 if t < 60 else 1e-3
            sequence.add(scale * float(rng.normal() + (t >= 60)), scale)
        assert sequence.sure == 1

    def test_looks_without_any_spread_wait(self) -> None:
        sequence = SignSequence()
        for _ in range(20):
            sequence.add(0.0, 0.0)
        assert not sequence.sure
