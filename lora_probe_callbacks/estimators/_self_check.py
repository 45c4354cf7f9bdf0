"""Rows that are not examples make s silently wrong: compare it once with an ordinary backward."""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

import torch
from torch import nn

from lora_probe_callbacks.estimators._backends import LossFunction, weighted_sums
from lora_probe_callbacks.restore.tree import Tree

# Disagreement allowed, relative to sum |w_n s_n|, by the lowest precision in the forward. Measured
# over 300 healthy pairs of model and batch: 1e-6 and 4e-2 at most; on the faults of
# tests/estimators: 1e-2 to 2. In 16 bits the smallest faults go unseen: check in float32 once. A
# float64 model is judged as float32: the norms and rotations of transformers run in that (5.23).
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}

_checked: weakref.WeakKeyDictionary[nn.Module, set[Hashable]] = weakref.WeakKeyDictionary()


class UntrustedProjectionError(RuntimeError):
    """The fast projection does not give what an ordinary backward gives."""


def first_use(model: nn.Module, loss_fn: Callable[..., Any], shape: Hashable) -> bool:
    """Return whether this model, loss function and shape have not passed the check yet."""
    return (_code(loss_fn), shape) not in _checked.get(model, set())


def passed(model: nn.Module, loss_fn: Callable[..., Any], shape: Hashable) -> None:
    """Remember that they have."""
    _checked.setdefault(model, set()).add((_code(loss_fn), shape))


def check(
    model: Tree,
    loss_fn: LossFunction,
    mu: Mapping[int, torch.Tensor],
    s: torch.Tensor,
    L: torch.Tensor,
    lowest: torch.dtype,
) -> None:
    """For random w, sum_n w_n s_n must equal <grad sum_n w_n L_n, mu>, one ordinary backward.

    Equal weights would not do: where only the attribution to examples is wrong, the sum of s
    is right.

    Args:
        model: the unwrapped module and what is in it.
        loss_fn: the losses, with the random streams where they were for s.
        mu: the direction by id of the parameter.
        s: what the projection has found, [B].
        L: the losses that it has seen, [B].
        lowest: the lowest precision in the forward, which sets the tolerance.

    Raises:
        UntrustedProjectionError: if they differ, or if loss_fn is not the same function twice.
    """
    # A generator of its own: the global stream is not ours to draw from.
    w = torch.randn(s.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(s)
    (expected,), (gradient_norm,), L_again = weighted_sums(model, loss_fn, mu, [w])
    allowed = _allowed(lowest)
    if not torch.allclose(L, L_again, rtol=allowed, atol=allowed * float(L.abs().max())):
        raise UntrustedProjectionError(
            f"loss_fn is not repeatable: two calls with the same random state differ by "
            f"{float((L - L_again).abs().max()):.2g}, so s cannot be checked. Make it a function of "
            "the model alone (no generator or cache of its own), or pass self_check='never'."
        )
    agrees(w, s, float(expected), float(gradient_norm), mu, lowest)


def agrees(
    w: torch.Tensor,
    s: torch.Tensor,
    expected: float,
    gradient_norm: float,
    mu: Mapping[int, torch.Tensor],
    lowest: torch.dtype,
) -> None:
    """Compare sum_n w_n s_n with <grad sum_n w_n L_n, mu>.

    Args:
        w: the weights, [B].
        s: what was found, [B].
        expected: the inner product of an ordinary backward.
        gradient_norm: the norm of its gradient.
        mu: the direction by id of the parameter.
        lowest: the lowest precision in the forward, which sets the tolerance.

    Raises:
        UntrustedProjectionError: if they differ.
    """
    lowest = torch.float32 if lowest == torch.float64 else lowest
    allowed = _allowed(lowest)
    found = (w * s).sum()
    length = sum(float(tensor.double().square().sum()) for tensor in mu.values()) ** 0.5
    dimension = sum(tensor.numel() for tensor in mu.values())
    # Where the terms nearly vanish, the rounding of the gradient is the yardstick: of relative size
    # eps and in no direction of its own, it has a part eps |g| |mu| / sqrt(dimension) along mu.
    floor = 8 * torch.finfo(lowest).eps * gradient_norm * length / math.sqrt(dimension)
    error = abs(float(found) - expected)
    scale = max(float((w * s).abs().sum()), abs(expected))
    if not error <= allowed * scale + floor:
        raise UntrustedProjectionError(
            f"the projection disagrees with an ordinary backward: got {float(found):.6g}, expected "
            f"{expected:.6g} (off by {error / max(scale, 1e-300):.2g} of the scale, allowed "
            f"{allowed:.0e}). A row of some layer is not the example it was taken for: sequence-first "
            "tensors or gathered tokens, losses that use other examples (in-batch negatives), a loss_fn that "
            "calls the model in chunks, or a parameter used outside its layer. Fix example_of_row, or use "
            "backend='loop'."
        )


def _allowed(lowest: torch.dtype) -> float:
    return _TOLERANCE[torch.float32 if lowest == torch.float64 else lowest]


def _code(loss_fn: Callable[..., Any]) -> Hashable:
    """Return what stays the same when a lambda is made anew for every batch: its code."""
    loss_fn = inspect.unwrap(loss_fn)
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    function: Any = getattr(loss_fn, "__func__", loss_fn)
    return cast("Hashable", getattr(function, "__code__", type(function)))
