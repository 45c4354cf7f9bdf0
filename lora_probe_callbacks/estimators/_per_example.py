"""One scalar eps_n per example, and layers that run at theta + eps_n * mu, for eps = 0.

As eps is zero the forward is the unperturbed one; only the derivative knows of mu. For a
layer with output y and the output's gradient g, and with dy the derivative of y along mu,

    ds_n = sum over the rows of example n of <g, dy>

is this layer's part of s_n = <grad L_n, mu>; autograd sums the parts of all layers in eps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812


class PerExample:
    """eps, kept per row [R] (or per token [R, T]), and the layers that have used it.

    Attributes:
        eps: the leaf whose gradient is s by rows; made when the first layer runs, on its device.
        visited: names of the layers that have run with a graph.
        dtypes: the floating types that they have computed in.
    """

    def __init__(self, rows: torch.Size | None, dtype: torch.dtype) -> None:
        self.eps: torch.Tensor | None = None
        self.visited: set[str] = set()
        self.dtypes: set[torch.dtype] = {dtype}
        self._rows = rows
        self._dtype = dtype

    def visit(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """Register a layer's call and hand out eps.

        Args:
            rows: the layer's input or output, whose first dimensions are the rows.
            name: of the layer.

        Returns:
            eps, [R] or [R, T].

        Raises:
            ValueError: if the first dimensions are not those of `example_of_row`.
        """
        if self._rows is None:
            self._rows = rows.shape[:1]
        if self.eps is None:
            self.eps = torch.zeros(self._rows, dtype=self._dtype, device=rows.device, requires_grad=True)
        if rows.shape[: len(self._rows)] != self._rows:
            raise ValueError(
                f"{name} got a tensor of shape {tuple(rows.shape)}, expected {tuple(self._rows)} rows "
                "first: one per example, or as example_of_row says. Rows that are regrouped inside the "
                "model (sequence first, flattened or gathered tokens, chunks) cannot be told apart here: "
                "give example_of_row, call the model once in loss_fn, or use backend='loop'."
            )
        self.visited.add(name)
        device = rows.device.type
        if torch.is_autocast_enabled(device):
            self.dtypes.add(torch.get_autocast_dtype(device))
        return self.eps


def row_sums(eps: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
    """Multiply, and sum over all but the rows, in the precision of eps.

    Args:
        eps: [R] or [R, T].
        factors: tensors [R, ...] or [R, T, ...] that broadcast to one shape.

    Returns:
        A layer's part of s by rows, of the shape of eps.
    """
    product = factors[0].to(eps.dtype)
    for factor in factors[1:]:
        product = product * factor.to(eps.dtype)
    return product.reshape(*eps.shape, -1).sum(-1).to(eps.device)


class Affine(NamedTuple):
    """A layer's W and b, and the parts M and m of the direction, which are moved to W when they are used."""

    W: torch.Tensor
    M: torch.Tensor
    b: torch.Tensor | None
    m: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> Affine:
        """Return all four in one type."""
        W, M, b, m = self
        return Affine(W.to(dtype), M.to(dtype), None if b is None else b.to(dtype), None if m is None else m.to(dtype))


class WideToNarrow(torch.autograd.Function):
    """y = W x + b with few outputs (LoRA's A): the derivative M x + m is computed with y.

    Both are one product, with [W; M], and of x nothing has to be kept.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Affine, eps: torch.Tensor) -> torch.Tensor:
        W, M, b, m = layer
        bias = None if b is None else torch.cat([b, torch.zeros_like(b) if m is None else m.to(b)])
        y, dy = F.linear(x, torch.cat([W, M.to(W)]), bias).chunk(2, dim=-1)
        ctx.W, ctx.eps = W, eps
        ctx.save_for_backward(dy)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,) = gradients
        (dy,) = ctx.saved_tensors
        dx = g @ ctx.W if ctx.needs_input_grad[0] else None
        return dx, None, row_sums(ctx.eps, g, dy)


class NarrowToWide(torch.autograd.Function):
    """y = W x + b with few inputs (LoRA's B): <g, M x + m> = <M^T g, x> + <m, g>.

    W^T g, which x needs anyway, and M^T g are one product, with [W, M] or [W, M, m], and there
    is no further pass over y.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Affine, eps: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.eps = layer, eps
        ctx.save_for_backward(x)
        return F.linear(x, layer.W, layer.b)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,) = gradients
        (x,) = ctx.saved_tensors
        W, M, _, m = ctx.layer
        columns = [W, M.to(W)] if m is None else [W, M.to(W), m.to(W)[:, None]]
        widths = [column.shape[1] for column in columns]
        dx, projected, *constant = torch.split(g @ torch.cat(columns, dim=1), widths, dim=-1)
        ds = row_sums(ctx.eps, projected, x)
        for part in constant:
            ds = ds + row_sums(ctx.eps, part)
        return dx, None, ds


class Along(torch.autograd.Function):
    """y of any layer, with its derivative dy along mu already at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        dy: torch.Tensor,
        eps: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(dy, eps)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,) = gradients
        dy, eps = ctx.saved_tensors
        return g, None, row_sums(eps, g, dy)


wide_to_narrow: Callable[..., torch.Tensor] = WideToNarrow.apply
narrow_to_wide: Callable[..., torch.Tensor] = NarrowToWide.apply
along: Callable[..., torch.Tensor] = Along.apply
