"""How much of an adapter's effect on some tokens another model shows, from log-probs alone.

Four log-probs of every token, in nats: ``on`` and ``off``, of the live model with its adapter and without, and
``served`` and ``served_off``, of the other model likewise. The effects are ``e = on - off`` and
``f = served - served_off``; if the same adapter acts on both sides, ``f = e`` but for rounding.

**Slope.** ``<e, f> / <e, e>`` is too small where ``e`` is noisy itself: its noise is in the divisor as well. The base
is scored on both sides, ``n = served_off - off``, and has the noise of ``off`` in it with the other sign, so that
``<e, n>`` is half the noise of ``e`` (if that of ``on`` is as large as that of ``off``), and

    slope = <e, f> / <e, e - 2 n>

has no bias. It costs nothing: the error of ``f - slope * (e - 2 n)`` is as large as that of ``f - slope * e``. Where
the live log-probs have no noise to speak of (``exact``), ``n`` is left out.

**Interval.** Where the live log-probs are exact, by the jackknife over units: the slope without each of them (Tukey
1958; the estimate CR3 of Bell and McCaffrey 2002). Else all slopes ``b`` for which the sums
``g_s(b) = <e, f - b (e - 2 n)>_s`` over the units ``s`` have a mean of zero by the t-test (Fieller 1954; Anderson and
Rubin 1949). That holds however small the effect is; where it is too small the interval is unbounded, and nothing can
be said. Tokens of one sequence are not independent, so a unit is a sequence; of less than ``FEW`` sequences, a run of
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

__all__ = ["FEW", "Fit", "LogProbs", "Slope", "misfit", "slope", "tokens_needed"]

Floats = NDArray[np.float64]
LogProbs = Sequence[Floats]  # of each sequence, [tokens], in nats

FEW = 32  # sequences, of which the spread is still well known
_RUN = 8  # tokens at least, in a unit that is not a whole sequence
_UNITS = 64
_SURE = 1.96  # standard errors


@dataclass(frozen=True, slots=True)
class Slope:
    """The part of the effect that is served.

    Attributes:
        value: The slope; NaN where the live adapter has no effect on these tokens.
        low: The lower end of its interval, which may be minus infinity.
        high: The upper end.
        correlation: Between the two effects, noise included.
        effect: Root mean square of the live effect, in nats a token, its noise taken off.
        effect_most: The most that it may be.
        served_effect: Of the served one, likewise.
        noise: Root mean square of the difference of the bases, in nats a token.
        tokens: Number of tokens.
        units: Number of units.
    """

    value: float
    low: float
    high: float
    correlation: float
    effect: float
    effect_most: float
    served_effect: float
    noise: float
    tokens: int
    units: int

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    @property
    def half_width(self) -> float:
        """Of the interval."""
        return (self.high - self.low) / 2


def slope(
    on: LogProbs,
    off: LogProbs,
    served: LogProbs,
    served_off: LogProbs,
    *,
    exact: bool = False,
    confidence: float = 0.95,
) -> Slope:
    """Measure which part of the live effect is served.

    Args:
        on: Log-probs of the live model with its adapter, one array a sequence.
        off: Without it.
        served: Of the other model.
        served_off: Of its base.
        exact: The live log-probs have no noise to speak of (float32 throughout).
        confidence: Of the interval.

    Returns:
        The slope and all that belongs to it.

    Raises:
        ValueError: If the four are not of the same shape, or hold no token.
    """
    starts = _units(_lengths(on, off, served, served_off))
    a, b, c, d = (
        np.concatenate([np.asarray(row, np.float64) for row in rows]) for rows in (on, off, served, served_off)
    )
    e, f, n = a - b, c - d, d - b
    known = e if exact else e - 2 * n
    # [units], sums over each
    top, bottom = np.add.reduceat(e * f, starts), np.add.reduceat(e * known, starts)
    tokens = len(e)
    low, high = (_jackknife if exact else _fieller)(top, bottom, confidence)
    denominator = bottom.sum()
    value = float(top.sum() / denominator) if e.any() and denominator > 0 else math.nan
    size = math.sqrt(float(e @ e) * float(f @ f))
    return Slope(
        value=value,
        low=low,
        high=high,
        correlation=float(e @ f) / size if size else 0.0,
        effect=math.sqrt(max(denominator, 0.0) / tokens),
        effect_most=math.sqrt(max(denominator + _SURE * float(bottom.std()) * math.sqrt(len(starts)), 0.0) / tokens),
        # the noise of f is -2 <f, n>, the same way
        served_effect=math.sqrt(max(float(f @ f + 2 * f @ n), 0.0) / tokens),
        noise=math.sqrt(float(n @ n) / tokens),
        tokens=tokens,
        units=len(starts),
    )


def _lengths(*rows: LogProbs) -> list[int]:
    lengths = [[len(row) for row in one] for one in rows]
    if any(one != lengths[0] for one in lengths):
        raise ValueError(f"got log-probs of sequences of {lengths} tokens, expected the same tokens four times")
    if not sum(lengths[0]):
        raise ValueError("got no token to compare, expected at least one")
    return lengths[0]


def _units(lengths: Sequence[int]) -> NDArray[np.int64]:
    """Where the units begin in the row of all tokens: sequences, or runs of tokens where these are few."""
    lengths = [length for length in lengths if length]
    run = max(lengths)
    if len(lengths) < FEW:
        run = max(_RUN, math.ceil(sum(lengths) / _UNITS))
    starts, at = [], 0
    for length in lengths:
        pieces = max(1, length // run)  # as many as fit: none is shorter than a run
        starts += [at + length * piece // pieces for piece in range(pieces)]
        at += length
    return np.array(starts)


def _jackknife(top: Floats, bottom: Floats, confidence: float) -> tuple[float, float]:
    """The slope, and its spread when one unit is left out."""
    units, t, b = len(top), float(top.sum()), float(bottom.sum())
    without = b - bottom
    if units < 2 or not (without > 0).all():
        return -math.inf, math.inf
    value = t / b
    spread = math.sqrt((units - 1) / units * float((((t - top) / without - value) ** 2).sum()))
    q = float(student.ppf(0.5 + confidence / 2, units - 1))
    return value - q * spread, value + q * spread


def _fieller(top: Floats, bottom: Floats, confidence: float) -> tuple[float, float]:
    """All b for which ``top - b bottom`` has a mean of zero by the t-test, over the units."""
    # With m for means and s for the (co)variances of means: (m_t - b m_b)^2 <= q^2 (s_tt - 2 b s_tb + b^2 s_bb).
    units = len(top)
    if units < 2 or not bottom.any():
        return -math.inf, math.inf
    q = float(student.ppf(0.5 + confidence / 2, units - 1))
    m_t, m_b = float(top.mean()), float(bottom.mean())
    (s_tt, s_tb), (_, s_bb) = np.cov(top, bottom) / units
    x = m_b**2 - q**2 * s_bb
    y = m_t * m_b - q**2 * s_tb
    z = m_t**2 - q**2 * s_tt
    if x <= 0:  # the effect itself is not told from zero
        return -math.inf, math.inf
    root = math.sqrt(max(y * y - x * z, 0.0))
    return float((y - root) / x), float((y + root) / x)


def tokens_needed(found: Slope, half_width: float = 0.25) -> int | None:
    """How many tokens like these would make the interval narrow enough.

    Args:
        found: What these tokens came to.
        half_width: That of the interval that is wanted.

    Returns:
        The number; where the interval is unbounded, the least that it may be; None if the adapter has no effect at all.
    """
    if not found.effect_most:
        return None
    if math.isfinite(found.half_width):
        return math.ceil(found.tokens * max(1.0, (found.half_width / half_width) ** 2))
    # The noise of e and of f together is twice that of the bases' difference; one token's part of the sum is the
    # product of the effect, itself noisy, and that.
    seen = math.hypot(found.effect_most, found.noise)
    error = _SURE * seen * math.sqrt(2) * found.noise / found.effect_most**2
    return max(math.ceil((error / half_width) ** 2), found.tokens + 1)


@dataclass(frozen=True, slots=True)
class Fit:
    """How far served log-probs are from those of one state of the live model, as a part of the adapter's effect.

    Attributes:
        part: Root mean square of the distance, noise taken off, over that of the effect. 0 is the same.
        low: The least that it may be.
        high: The most.
    """

    part: float
    low: float
    high: float


def misfit(
    state: LogProbs, off: LogProbs, served: LogProbs, served_off: LogProbs, effect: float, *, confidence: float = 0.95
) -> Fit:
    """The distance of served log-probs from those of one state of the live model.

    Their difference ``m`` has as much noise in it as the difference ``n`` of the bases, so what is left of it is
    ``<m, m> - <n, n>``.

    Args:
        state: Log-probs of the live model in that state.
        off: With the adapter off.
        served: Of the other model.
        served_off: Of its base.
        effect: Root mean square of the adapter's effect, in nats a token.
        confidence: Of the bounds.

    Returns:
        The distance.
    """
    starts = _units([len(row) for row in off])
    s, b, c, d = (
        np.concatenate([np.asarray(r, np.float64) for r in rows]) for rows in (state, off, served, served_off)
    )
    left = np.add.reduceat((c - s) ** 2 - (d - b) ** 2, starts)
    tokens, units = len(s), len(starts)
    if not effect:
        return Fit(math.inf, 0.0, math.inf)
    mean = float(left.sum()) / tokens
    spread = math.inf
    if units > 1:
        q = float(student.ppf(0.5 + confidence / 2, units - 1))
        spread = q * float(left.std(ddof=1)) * math.sqrt(units) / tokens
    part, low, high = (math.sqrt(max(value, 0.0)) / effect for value in (mean, mean - spread, mean + spread))
    return Fit(part, low, high)
