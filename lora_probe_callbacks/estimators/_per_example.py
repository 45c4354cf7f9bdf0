"""One scalar eps_n per example, and layers that run at theta + eps_n * mu, for eps = 0.

As eps is zero the forward is the unperturbed one; only the derivative knows of mu. For a
layer with output y and the output's gradient g, and with dy the derivative of y along mu,

    ds_n = sum over the rows of example n of <g, dy>

is this layer's part of s_n = <grad L_n, mu>; autograd sums the parts of all layers in eps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812


class PerExample:
    """eps [N], the rows that belong to each example, and the layers that have used it.

    Attributes:
        eps: the leaf that receives s; made when the first layer runs, on its device.
        visited: names of the layers that have run with a graph.
        dtypes: the floating types that they have computed in.
    """

    def __init__(self, example_of_row: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.eps: torch.Tensor | None = None
        self.visited: set[str] = set()
        self.dtypes: set[torch.dtype] = {dtype}
        self._example_of_row = example_of_row
        self._count = None if example_of_row is None else int(example_of_row.max()) + 1
        self._dtype = dtype

    def visit(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """Register a layer's call and hand out eps.

        Args:
            rows: the layer's input or output, whose first dimensions are the rows.
            name: of the layer.

        Returns:
            eps [N].

        Raises:
            ValueError: if the first dimensions are not those of `example_of_row`.
        """
        if self._example_of_row is None:
            self._example_of_row = torch.arange(rows.shape[0])
            self._count = rows.shape[0]
        if self.eps is None:
            assert self._count is not None
            self.eps = torch.zeros(self._count, dtype=self._dtype, device=rows.device, requires_grad=True)
        expected = self._example_of_row.shape
        if rows.shape[: len(expected)] != expected:
            raise ValueError(
                f"{name} got a tensor of shape {tuple(rows.shape)}, expected {tuple(expected)} rows "
                "first: one per example, or as example_of_row says. Rows that are regrouped inside the "
                "model (sequence first, flattened or gathered tokens, chunks) cannot be told apart here: "
                "give example_of_row, call the model once in loss_fn, or use backend='loop'."
            )
        self.visited.add(name)
        device = rows.device.type
        autocast = torch.is_autocast_enabled(device)
        self.dtypes.add(torch.get_autocast_dtype(device) if autocast else self._dtype)
        return self.eps

    def sums(self, *factors: torch.Tensor) -> torch.Tensor:
        """Multiply, and sum over all that belongs to an example, in the precision of eps: [N].

        Args:
            factors: tensors [rows, ...] that broadcast to one shape.

        Returns:
            This layer's part of s.
        """
        assert self._example_of_row is not None
        assert self.eps is not None
        rows = self._example_of_row.to(self.eps.device)
        product = factors[0].to(self._dtype)
        for factor in factors[1:]:
            product = product * factor.to(self._dtype)
        per_row = product.reshape(*rows.shape, -1).sum(-1).to(self.eps.device)
        return torch.zeros_like(self.eps).index_add_(0, rows.flatten(), per_row.flatten())


class WideToNarrow(torch.autograd.Function):
    """y = W x + b with few outputs (LoRA's A): the derivative M x + m is computed with y.

    `stacked` is [W; M], so both are one product, and of x nothing has to be kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        stacked: torch.Tensor,
        stacked_bias: torch.Tensor | None,
        eps: torch.Tensor,
        examples: PerExample,
    ) -> torch.Tensor:
        y, dy = F.linear(x, stacked, stacked_bias).chunk(2, dim=-1)
        ctx.save_for_backward(stacked, dy)
        ctx.examples = examples
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,) = gradients
        stacked, dy = ctx.saved_tensors
        W = stacked[: g.shape[-1]]
        dx = g @ W if ctx.needs_input_grad[0] else None
        return dx, None, None, ctx.examples.sums(g, dy), None


class NarrowToWide(torch.autograd.Function):
    """y = W x + b with few inputs (LoRA's B): <g, M x + m> = <M^T g, x> + <m, g>.

    `stacked` is [W, M] or [W, M, m]: W^T g, which x needs anyway, and M^T g are one product,
    and there is no further pass over y.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        stacked: torch.Tensor,
        bias: torch.Tensor | None,
        eps: torch.Tensor,
        examples: PerExample,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, stacked)
        ctx.examples = examples
        return F.linear(x, stacked[:, : x.shape[-1]], bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,) = gradients
        x, stacked = ctx.saved_tensors
        r = x.shape[-1]
        transposed = g @ stacked
        ds = ctx.examples.sums(transposed[..., r : 2 * r], x)
        if stacked.shape[1] > 2 * r:
            ds = ds + ctx.examples.sums(transposed[..., 2 * r :])
        return transposed[..., :r], None, None, ds, None


class Along(torch.autograd.Function):
    """y of any layer, with its derivative dy along mu already at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        dy: torch.Tensor,
        eps: torch.Tensor,
        examples: PerExample,
    ) -> torch.Tensor:
        ctx.save_for_backward(dy)
        ctx.examples = examples
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,) = gradients
        (dy,) = ctx.saved_tensors
        return g, None, ctx.examples.sums(g, dy), None


wide_to_narrow: Callable[..., torch.Tensor] = WideToNarrow.apply
narrow_to_wide: Callable[..., torch.Tensor] = NarrowToWide.apply
along: Callable[..., torch.Tensor] = Along.apply
