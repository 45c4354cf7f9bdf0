"""The slope has no bias, and its interval covers the truth as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_probe_callbacks.serving.measure import LogProbs, misfit, slope, tokens_needed

# Nats a token: half of the 0.0012 between the bases of a trainer and of vLLM in bfloat16 comes from each.
NOISE = 0.0012 / math.sqrt(2)
Floats = NDArray[np.float64]


def correlated(generator: np.random.Generator, lengths: Floats) -> Floats:
    """Of a variance of one, heavy-tailed, alike in neighbouring tokens of a sequence."""
    parts = []
    for length in lengths:
        white = generator.standard_normal(int(length) + 7)
        smooth = np.convolve(white, np.full(8, 8**-0.5), mode="valid")
        parts.append(np.sign(smooth) * np.abs(smooth) ** 1.5)
    values = np.concatenate(parts)
    return values / np.sqrt((values**2).mean())


def draw(
    generator: np.random.Generator,
    effect: float,
    true: float,
    *,
    live_noise: float,
    noise: float = NOISE,
    sequences: int = 40,
) -> tuple[LogProbs, LogProbs, LogProbs, LogProbs]:
    lengths = generator.integers(32, 65, sequences)
    size = int(lengths.sum())
    change = effect * correlated(generator, lengths)
    base = -generator.exponential(2.0, size)

    def split(values: Floats, sigma: float) -> LogProbs:
        return np.split(values + sigma * generator.standard_normal(size), np.cumsum(lengths)[:-1])

    on, off = split(base + change, live_noise), split(base, live_noise)
    return on, off, split(base + true * change, noise), split(base, noise)


@pytest.mark.parametrize("live_noise", [0.0, NOISE])
def test_interval_covers_the_true_slope_in_95_of_100_draws(live_noise: float) -> None:
    generator = np.random.default_rng(0)
    covered = bounded = 0
    for _ in range(2000):
        effect, true = 10 ** generator.uniform(-3, 0), generator.choice([0.0, 0.5, 1.0])
        found = slope(*draw(generator, effect, true, live_noise=live_noise), exact=not live_noise)
        covered += found.low <= true <= found.high
        bounded += math.isfinite(found.half_width)
    assert 0.94 <= covered / 2000 <= 0.96, covered / 2000
    assert bounded > 1990


@pytest.mark.parametrize("sequences", [1, 4])
def test_interval_of_few_sequences_is_not_too_narrow(sequences: int) -> None:
    generator = np.random.default_rng(1)
    draws = [draw(generator, 0.1, 1.0, live_noise=NOISE, sequences=sequences) for _ in range(400)]
    covered = sum(f.low <= 1.0 <= f.high for f in (slope(*one) for one in draws))
    assert covered / 400 >= 0.92


def test_noise_of_the_live_side_does_not_bend_the_slope() -> None:
    """The plain quotient is a third of the slope here: two thirds of e are noise."""
    generator = np.random.default_rng(2)
    draws = [draw(generator, 0.01, 1.0, live_noise=0.01, noise=0.01, sequences=200) for _ in range(20)]
    corrected = np.mean([slope(*one).value for one in draws])
    plain = np.mean([slope(*one, exact=True).value for one in draws])
    assert corrected == pytest.approx(1.0, abs=0.05)
    assert plain == pytest.approx(1 / 3, abs=0.05)


def test_effect_below_the_noise_is_unbounded_and_says_how_many_tokens_it_takes() -> None:
    generator = np.random.default_rng(3)
    few = slope(*draw(generator, 0.001, 1.0, live_noise=0.01, noise=0.01, sequences=8))
    assert few.half_width > 0.25
    needed = tokens_needed(few)
    assert needed is not None
    assert needed > few.tokens


def test_as_many_tokens_as_were_said_settle_it() -> None:
    generator = np.random.default_rng(4)
    wide = slope(*draw(generator, 0.003, 1.0, live_noise=0.003, noise=0.003, sequences=40))
    assert 0.02 < wide.half_width < math.inf
    needed = tokens_needed(wide, wide.half_width / 2)
    assert needed == pytest.approx(4 * wide.tokens, rel=0.01)
    narrow = slope(*draw(generator, 0.003, 1.0, live_noise=0.003, noise=0.003, sequences=40 * 4))
    assert narrow.half_width == pytest.approx(wide.half_width / 2, rel=0.4)


def test_adapter_without_an_effect_cannot_be_measured() -> None:
    zeros = [np.zeros(8)] * 4
    found = slope(zeros, zeros, zeros, zeros, exact=True)
    assert math.isnan(found.value)
    assert found.interval == (-math.inf, math.inf)
    assert tokens_needed(found) is None


def test_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the same tokens four times"):
        slope([np.zeros(3)], [np.zeros(3)], [np.zeros(2)], [np.zeros(3)])
    with pytest.raises(ValueError, match="got no token"):
        slope([], [], [], [])


def test_distance_has_the_noise_of_the_bases_taken_off() -> None:
    generator = np.random.default_rng(5)
    on, off, served, base = draw(generator, 0.05, 1.0, live_noise=0.01, noise=0.01, sequences=200)
    effect = slope(on, off, served, base).effect
    assert effect == pytest.approx(0.05, rel=0.1)
    same = misfit(on, off, served, base, effect)
    assert same.low == 0.0
    assert same.high < 0.15
    ignored = misfit(off, off, served, base, effect)
    assert ignored.part == pytest.approx(1.0, abs=0.1)
