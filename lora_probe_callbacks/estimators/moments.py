"""Running moments of per-prompt projections, as a torchmetrics metric.

In a module of its own: nothing else here needs torchmetrics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lora_probe_callbacks.estimators.variance import checked


class ConditionalMoments(NamedTuple):
    """What `ConditionalVariance` computes, 0-d tensors, before any `scale`."""

    mean: Tensor
    """Mean of `s_n`; `delta_1 = scale * mean`."""
    variance: Tensor
    """Sample variance of `s_n`, with B - 1 in the denominator; not that of the mean."""
    standard_error: Tensor
    """`sqrt(variance / count)`; that of `delta_1` is `|scale|` times it."""
    count: Tensor  # type: ignore[assignment]  # tuple has a method of that name, unused here
    """`B_E`, the prompts seen."""


class ConditionalVariance(Metric):
    """Mean, variance and standard error of `s_n` over micro-batches and ranks, given the U-batch.

    Mean and sum of squared deviations are merged exactly (Chan, Golub and LeVeque 1983) in float64, on
    numbers shifted by the first value seen, so that a mean many times the spread costs no digits: the
    textbook `sum s^2 - B s_bar^2` would cancel. On several ranks give each rank its own prompts: one that two
    ranks saw counts twice.

    Args:
        kwargs: Those of every `torchmetrics.Metric`.

    Example:
        >>> metric = ConditionalVariance()
        >>> metric.update(torch.tensor([1.0, 2.0]))
        >>> metric.update(torch.tensor([3.0, 6.0]))
        >>> mean, variance, standard_error, count = metric.compute()
        >>> round(mean.item(), 4), round(variance.item(), 4), round(standard_error.item(), 4), count.item()
        (3.0, 4.6667, 1.0801, 4)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("moments", default=torch.zeros(4, dtype=torch.float64), dist_reduce_fx=_merge_all)

    def update(self, s: Tensor) -> None:
        """Add the projections of some prompts, `[B]`."""
        self.moments = _merge(self.moments, _moments(checked(s, at_least=1)))

    def compute(self) -> ConditionalMoments:
        """Return the moments over all prompts and ranks; at least two prompts must have been seen."""
        return _compute(self.moments)

    def forward(self, s: Tensor) -> ConditionalMoments:
        """Add the projections of some prompts and compute the moments of these alone.

        Args:
            s: Projections, `[B]` with B >= 2 (`update` takes single prompts too).

        Returns:
            The moments of `s`.
        """
        # Checked before torchmetrics sets the accumulated state aside: an error later would lose it.
        moments: ConditionalMoments = super().forward(checked(s, at_least=2))
        return moments


# Moments, `[4]` float64: the count, the first value, the mean relative to it, the sum of squared deviations.


def _moments(s: Tensor) -> Tensor:
    shifted = s - s[0]
    mean = shifted.mean()
    return torch.stack([torch.ones_like(mean) * len(s), s[0], mean, (shifted - mean).square().sum()])


def _merge(a: Tensor, b: Tensor) -> Tensor:
    (count_a, first_a, mean_a, M2_a), (count_b, first_b, mean_b, M2_b) = a, b
    count = count_a + count_b
    first = torch.where(count_a > 0, first_a, first_b)
    # First values are subtracted before anything is added, and that of an empty part, 0, counts as `first`:
    # everything stays of the size of the spread, and no digit of it is lost.
    from_a = mean_a
    from_b = torch.where(count_b > 0, first_b - first, 0.0) + mean_b
    part_b = count_b / count.clamp(min=1)
    mean = from_a + (from_b - from_a) * part_b
    M2 = M2_a + M2_b + (from_b - from_a).square() * count_a * part_b
    return torch.stack([count, first, mean, M2])


def _merge_all(moments: Tensor) -> Tensor:
    merged = moments[0]
    for other in moments[1:]:
        merged = _merge(merged, other)
    return merged


def _compute(moments: Tensor) -> ConditionalMoments:
    count, first, mean, M2 = moments
    if count < 2:
        raise ValueError(
            f"got {int(count)} prompts, expected at least 2: one has no variance; add prompts to the E-batch"
        )
    variance = M2 / (count - 1)
    return ConditionalMoments(first + mean, variance, (variance / count).sqrt(), count.long())
