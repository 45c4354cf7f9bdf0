"""How sure a predicted change is: conditional and two-way variance, Student's t, running moments.

`s[n] = <X_n, mu_Y>` is prompt n's directional derivative along the update (`per_prompt_projection`),
in nats per unit of the direction; `scale` is the direction's, +lr, -lr or 1. All is computed in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor
from torchmetrics import Metric


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


class TwoWayVariance(NamedTuple):
    """Variance of `delta_1` over the draw of both batches, 0-d tensors."""

    V_X: Tensor
    """From the draw of E, before `scale`."""
    V_Y: Tensor
    """From the draw of U, before `scale`."""
    standard_error: Tensor
    """`|scale| * sqrt(V_X + V_Y)`."""


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
        self.moments = _merge(self.moments, _moments(_checked(s, at_least=1)))

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
        moments: ConditionalMoments = super().forward(_checked(s, at_least=2))
        return moments


def first_order_change(s: Tensor, scale: float) -> Tensor:
    """`delta_1 = scale * mean_n s_n`, the first-order predicted change ("bars dot", `<X_bar, Y_bar>`).

    Args:
        s: Projections, `[B_E]`.
        scale: The direction's: +lr where it ascends a surrogate, -lr for a loss gradient, 1 for a step.

    Returns:
        The change of the mean surrogate, a scalar.
    """
    return scale * _checked(s, at_least=1).mean()


def conditional_variance(s: Tensor, scale: float) -> Tensor:
    """`V_{E|U} = scale^2 * sample_var(s_n) / B_E`, the variance of `delta_1` given the U-batch.

    Given U the direction is fixed and the `s_n` are independent, so this is the variance of a mean, and
    its square root the standard error.

    Args:
        s: Projections of the E-batch, `[B_E]`, B_E >= 2.
        scale: The direction's scale.

    Returns:
        The variance, a scalar.
    """
    s = _checked(s, at_least=2)
    return scale**2 * s.var() / len(s)


def u_statistic_variance(s_X: Tensor, s_Y: Tensor, scale: float) -> TwoWayVariance:
    """Variance of `delta_1 = scale * <X_bar, Y_bar>` over the draw of both batches, E and U.

        V_X = 1 / (B_E (B_E - 1)) * sum_n <X_n - X_bar, mu_Y>^2
        V_Y = 1 / (B_U (B_U - 1)) * sum_p <Y_p - Y_bar, mu_X>^2

    Conservative: both parts contain the interaction of the noise of X and of Y, which so counts twice. In
    high dimension `V_X + V_Y` is up to 2 times the true variance, the standard error up to sqrt 2 times
    (simulated, intervals of nominal 95% then cover 99%). `V_Y` holds where `mu_Y` is the plain mean of the
    `Y_p`, or a fixed linear map of it (then apply the same map to `mu_X`); Adam's second moments, made
    from the same gradients, are fixed only approximately.

    Args:
        s_X: `<X_n, mu_Y>`, projections of the E-batch on the direction from U, `[B_E]`, B_E >= 2.
        s_Y: `<Y_p, mu_X>`, projections of the U-batch on the direction from E, `[B_U]`, B_U >= 2.
        scale: The scale of `mu_Y`.

    Returns:
        `V_X`, `V_Y` and the two-way standard error.
    """
    V_X, V_Y = conditional_variance(s_X, 1.0), conditional_variance(s_Y, 1.0)
    return TwoWayVariance(V_X, V_Y, abs(scale) * (V_X + V_Y).sqrt())


def t_interval(
    mean: Tensor | float, standard_error: Tensor | float, count: Tensor | int, confidence: float = 0.95
) -> tuple[Tensor, Tensor]:
    """`mean -+ t * standard_error`, with Student's t of `count - 1` degrees of freedom.

    Covers the truth as often as it says where the `s_n` are Gaussian; a normal quantile in the place of t
    would cover 0.86 of 0.95 at 4 prompts and 0.91 at 8. Where the `s_n` have heavy tails (few prompts that
    dominate) it covers less: look at the `s_n` themselves, or take more prompts.

    Args:
        mean: The estimate, any shape.
        standard_error: Its standard error, same shape.
        count: Prompts behind each, B >= 2.
        confidence: The nominal coverage.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: If a count is below 2, or `confidence` not between 0 and 1.
    """
    counts = torch.as_tensor(count)
    if bool((counts < 2).any()):
        raise ValueError(f"got count={count}, expected at least 2 prompts: one has no variance; add prompts")
    if not 0 < confidence < 1:
        raise ValueError(f"got confidence={confidence}, expected a probability between 0 and 1, such as 0.95")
    center = torch.as_tensor(mean, dtype=torch.float64)
    quantile = stats.t.ppf((1 + confidence) / 2, counts.cpu().numpy() - 1)
    half = torch.as_tensor(quantile, dtype=torch.float64, device=center.device) * standard_error
    return center - half, center + half


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


def _checked(s: Tensor, at_least: int) -> Tensor:
    if s.ndim != 1 or len(s) < at_least:
        raise ValueError(
            f"got s of shape {list(s.shape)}, expected [B] with B >= {at_least}: one projection per prompt"
            + ("; a single prompt has no variance, add prompts" if at_least > 1 else "")
        )
    if not bool(s.isfinite().all()):
        bad = (~s.isfinite()).nonzero()[:, 0].tolist()
        raise ValueError(
            f"got s with {len(bad)} of {len(s)} entries not finite, the first at prompts {bad[:8]}, expected "
            "finite numbers: look at the loss of those prompts"
        )
    return s.detach().double()
