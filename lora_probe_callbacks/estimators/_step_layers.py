"""What a layer's parameters get from each example, from its input and the gradient of its output.

Every rule knows two forms. With `x` the input and `g` the gradient at the output, both by position (a token of a row),

    by position   ds_p = <g_p, dy_p>, dy the derivative of the output along a direction: scores, also per token
    by example    G[n] = the gradient of the parameters from the positions of example n alone: norms and products

as `sum_n G[n]` is the gradient itself. G is made in blocks of bounded size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lora_probe_callbacks.estimators._layers import _refuse_bypassed, _swapped
from lora_probe_callbacks.restore.tree import Tree

_BLOCK = 1 << 24  # elements of a block of per-example gradients

Directions = Sequence[Mapping[int, torch.Tensor]]
# A block of gradients by example [B, p], and the same part of every direction [K, p].
Block = tuple[torch.Tensor, torch.Tensor | None]


class Call(NamedTuple):
    """The arguments of a layer's call."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def first(self) -> torch.Tensor:
        """The input."""
        value: torch.Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return value


class Grouping:
    """Which positions of a tensor are of which example.

    Args:
        rows: the first dimensions of every tensor: [R], or [R, T] of packed rows.
        example_of_row: of the same shape, 0..B-1, on the device; None if rows are examples.
        count: B.
    """

    def __init__(self, rows: torch.Size, example_of_row: torch.Tensor | None, count: int) -> None:
        self.rows = rows
        self.cells = math.prod(rows)
        self.count = count
        self.example_of_row = example_of_row
        self._index: tuple[torch.Tensor, torch.Tensor] | None = None

    def fold(self, by_cell: torch.Tensor) -> torch.Tensor:
        """Sum [cells, ...] by example, [B, ...]."""
        if self.example_of_row is None:
            return by_cell
        summed = by_cell.new_zeros(self.count, *by_cell.shape[1:])
        return summed.index_add_(0, self.example_of_row.flatten(), by_cell)

    def examples(self, t: torch.Tensor) -> torch.Tensor:
        """Gather the positions of every example: [rows, ..., width] -> [B, P, width], padded with position 0."""
        t = t.reshape(self.cells, -1, t.shape[-1])
        return t if self.example_of_row is None else t[self._gather()[0]].flatten(1, 2)

    def padding_removed(self, t: torch.Tensor) -> torch.Tensor:
        """Gather as `examples` does, with zeros in the padding: what multiplies all the rest."""
        t = t.reshape(self.cells, -1, t.shape[-1])
        if self.example_of_row is None:
            return t
        index, real = self._gather()
        return (t[index] * real[..., None, None].to(t.dtype)).flatten(1, 2)

    def _gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._index is None:
            assert self.example_of_row is not None
            example = self.example_of_row.flatten()
            order = example.argsort(stable=True)
            sizes = example.bincount(minlength=self.count)
            within = torch.arange(len(example), device=example.device) - (sizes.cumsum(0) - sizes)[example[order]]
            index = torch.zeros(self.count, int(sizes.max()), dtype=torch.long, device=example.device)
            real = torch.zeros_like(index, dtype=torch.bool)
            index[example[order], within], real[example[order], within] = order, True
            self._index = index, real
        return self._index


class Rule(Protocol):
    """How the parameters of one kind of layer get their gradient."""

    def by_position(self, call: Call, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return <g_p, dy_p> along every direction, [positions, K]."""
        ...

    def by_example(self, call: Call, g: torch.Tensor, groups: Grouping) -> Iterator[Block]:
        """Yield G[n] in blocks."""
        ...


class Layer(NamedTuple):
    """A layer that owns parameters to look at."""

    path: str
    module: nn.Module
    rule: Rule
    parameters: tuple[nn.Parameter, ...]
    directed: bool  # some direction moves them


class Along:
    """The parts of K directions that belong to one parameter, stacked, in the types that they are asked for in.

    Args:
        parts: M_k, None where a direction leaves the parameter out; all of one shape.
        shape: of the parameter.
    """

    def __init__(self, parts: Sequence[torch.Tensor | None], shape: torch.Size) -> None:
        self._parts = parts
        self._shape = shape
        self._made: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    @property
    def empty(self) -> bool:
        """No direction moves this parameter."""
        return all(part is None for part in self._parts)

    def to(self, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return M [K, *shape] on the device of a tensor, in its type or another."""
        key = (like.device, dtype or like.dtype)
        if key not in self._made:
            zero = torch.zeros(self._shape, device=key[0], dtype=key[1])
            parts = [zero if part is None else part.to(*key) for part in self._parts]
            self._made[key] = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        return self._made[key]


def plan(model: Tree, directions: Directions, wanted: Mapping[int, nn.Parameter]) -> list[Layer]:
    """Choose a rule for every layer that owns a wanted parameter, or refuse it by name.

    Args:
        model: the unwrapped module and what is in it.
        directions: K of them, by id of the parameter.
        wanted: the parameters to look at, by id.

    Returns:
        The layers, in the order of the modules.

    Raises:
        NotImplementedError: if a layer has no rule, or is not run as it is written.
    """
    layers: list[Layer] = []
    embeddings: dict[str, dict[tuple[str, str], nn.Parameter]] = {}
    for path, module in model.modules.items():
        mine = {name: p for name, p in module._parameters.items() if id(p) in wanted and p is not None}
        if not mine:
            continue
        layer_path, layer = _refuse_bypassed(path, mine, model.modules)
        if isinstance(module, nn.ParameterDict):
            kind = path.rpartition(".")[2]
            if type(layer).__name__ != "Embedding" or not kind.startswith("lora_embedding_"):
                _refuse(path, module, mine)
            for adapter, p in mine.items():
                embeddings.setdefault(layer_path, {})[kind, adapter] = p
            continue
        along = {name: Along([mu.get(id(p)) for mu in directions], p.shape) for name, p in mine.items()}
        directed = not all(part.empty for part in along.values())
        layers.append(Layer(path, module, _rule(path, module, mine, along), tuple(mine.values()), directed))
    for path, factors in embeddings.items():
        module = model.modules[path]
        both = {key: Along([mu.get(id(p)) for mu in directions], p.shape) for key, p in factors.items()}
        directed = not all(part.empty for part in both.values())
        rule = LoraEmbedding(module, both, len(directions))
        layers.append(Layer(path, module, rule, tuple(factors.values()), directed))
    return layers


def _rule(path: str, module: nn.Module, mine: Mapping[str, nn.Parameter], along: Mapping[str, Along]) -> Rule:
    kind: Any = type(module)
    transposed = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"  # GPT-2
    if transposed or kind.forward is nn.Linear.forward or (isinstance(module, nn.Linear) and along.keys() == {"bias"}):
        return Linear(along, transposed=transposed)
    if isinstance(module, nn.Embedding):
        known = kind.forward is nn.Embedding.forward or isinstance(getattr(module, "embed_scale", None), torch.Tensor)
        if not known or module.max_norm is not None or module.scale_grad_by_freq:
            _refuse(path, module, mine)
        return Embedding(module, along["weight"])
    whole = isinstance(module, (nn.modules.conv._ConvNd, nn.GroupNorm, nn.modules.batchnorm._NormBase))
    per_channel = hasattr(kind, "get_lora_weight") or (kind.__name__.endswith("Norm") and not list(module.children()))
    vectors = all(p.dim() == 1 for p in mine.values())
    if whole or (hasattr(kind, "get_lora_weight") and not vectors):
        return Whole(module, along)
    return PerChannel(module, along) if per_channel and vectors else _refuse(path, module, mine)


def _refuse(path: str, module: nn.Module, mine: Mapping[str, Any]) -> NoReturn:
    raise NotImplementedError(
        f"no rule for {', '.join(sorted(mine))} of {path} ({type(module).__name__}) inside a training step; leave it "
        "out of the directions (norms and products need all that trains), or use per_prompt_projection(backend='loop')"
    )


class Linear:
    """y = W x + b: G_W[n] = sum_p g_p x_p^T, G_b[n] = sum_p g_p.

    <g, M x> is computed from the narrower side: (M x) against g where there are fewer outputs (LoRA's A), (M^T g)
    against x where there are fewer inputs (LoRA's B). All K directions are columns of one product.
    """

    def __init__(self, along: Mapping[str, Along], *, transposed: bool) -> None:
        self._weight, self._bias = along.get("weight"), along.get("bias")
        self._transposed = transposed

    def by_position(self, call: Call, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        g = g.reshape(-1, g.shape[-1])
        parts = []
        if self._weight is not None and not self._weight.empty:
            x = call.first.reshape(-1, call.first.shape[-1])
            M = self._weight.to(x)
            if self._transposed:
                M = M.mT
            K, outputs, inputs = M.shape
            if outputs <= inputs:
                wide, narrow, columns = x, g, M.reshape(K * outputs, inputs).T
            else:
                wide, narrow, columns = g.to(x.dtype), x, M.permute(1, 0, 2).reshape(outputs, K * inputs)
            product = (wide @ columns).view(len(x), K, -1)
            parts.append((product.to(dtype) * narrow.to(dtype)[:, None]).sum(-1))
        if self._bias is not None and not self._bias.empty:
            parts.append(g.to(dtype) @ self._bias.to(g, dtype).T)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def by_example(self, call: Call, g: torch.Tensor, groups: Grouping) -> Iterator[Block]:
        g = groups.padding_removed(g)
        if self._weight is not None:
            x = groups.examples(call.first)
            g_W = g.to(x.dtype)
            rows = max(1, _BLOCK // (len(x) * x.shape[-1]))
            M = None if self._weight.empty else self._weight
            for start in range(0, g.shape[-1], rows):
                G = torch.bmm(g_W[..., start : start + rows].mT, x)  # [B, rows, inputs]
                mu = None
                if M is not None:
                    whole = M.to(x, _sum_type(x))
                    mu = (whole.mT if self._transposed else whole)[:, start : start + rows].flatten(1)
                yield G.flatten(1), mu
        if self._bias is not None:
            yield g.sum(1), None if self._bias.empty else self._bias.to(g, _sum_type(g))


class PerChannel:
    """y_c affine in p_c, channel by channel: scales and shifts of norms, DoRA's magnitude.

    dy_c/dp_c = f(p <- 1)_c - f(p <- 0)_c; the difference removes what does not depend on p (Gemma multiplies by 1 + w).
    """

    def __init__(self, module: nn.Module, along: Mapping[str, Along]) -> None:
        self._module, self._along = module, along

    def _slopes(self, call: Call) -> Iterator[tuple[Along, torch.Tensor]]:
        for attribute, along in self._along.items():
            like = getattr(self._module, attribute)
            with torch.no_grad(), _swapped(self._module, attribute) as swap:
                swap(torch.ones_like(like))
                at_one = self._module.forward(*call.args, **call.kwargs)
                swap(torch.zeros_like(like))
                at_zero = self._module.forward(*call.args, **call.kwargs)
            yield along, at_one - at_zero

    def by_position(self, call: Call, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        parts = [
            (g.to(dtype) * slope.to(dtype)).reshape(-1, g.shape[-1]) @ along.to(g, dtype).T
            for along, slope in self._slopes(call)
            if not along.empty
        ]
        return torch.stack(parts).sum(0)

    def by_example(self, call: Call, g: torch.Tensor, groups: Grouping) -> Iterator[Block]:
        for along, slope in self._slopes(call):
            G = groups.padding_removed(g * slope).sum(1)
            yield G, None if along.empty else along.to(G, _sum_type(G))


class Whole:
    """A layer whose parameters mix positions (convolution, group norm): run again, row by row."""

    def __init__(self, module: nn.Module, along: Mapping[str, Along]) -> None:
        self._module, self._along = module, along

    def by_position(self, call: Call, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        blocks = [G.to(dtype) @ mu.to(dtype).T for G, mu in self._by_row(call, g) if mu is not None]
        return torch.stack(blocks).sum(0)

    def by_example(self, call: Call, g: torch.Tensor, groups: Grouping) -> Iterator[Block]:
        return ((groups.fold(G), mu) for G, mu in self._by_row(call, g))

    def _by_row(self, call: Call, g: torch.Tensor) -> Iterator[Block]:
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in self._along}
        for n in range(len(g)):
            row = functools.partial(_row, n, len(g))
            args, kwargs = tuple(map(row, call.args)), {name: row(value) for name, value in call.kwargs.items()}
            for name in self._along:
                with torch.enable_grad(), _swapped(self._module, name) as swap:
                    leaf = getattr(self._module, name).detach().requires_grad_()
                    swap(leaf)
                    y = self._module.forward(*args, **kwargs)
                    rows[name].append(torch.autograd.grad(y, leaf, g[n : n + 1])[0].flatten())
        for name, along in self._along.items():
            G = torch.stack(rows[name])
            yield G, None if along.empty else along.to(G, _sum_type(G)).flatten(1)


class Embedding:
    """y = scale * W[ids]: row v of G[n] is the sum of scale * g over the positions of n that hold v."""

    def __init__(self, module: nn.Embedding, along: Along) -> None:
        self._module, self._along = module, along

    def _scaled(self, ids: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        scale: Any = getattr(self._module, "embed_scale", None)
        if scale is not None:
            g = g * scale.to(g)
        return _without_padding(self._module, ids, g)

    def by_position(self, call: Call, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ids = call.first
        g = self._scaled(ids, g).to(dtype).reshape(-1, g.shape[-1])
        return torch.stack([(M[ids.flatten()].to(dtype) * g).sum(-1) for M in self._along.to(g)], dim=1)

    def by_example(self, call: Call, g: torch.Tensor, groups: Grouping) -> Iterator[Block]:
        ids = call.first
        g = self._scaled(ids, g)
        M = None if self._along.empty else self._along.to(g, _sum_type(g))
        yield from _row_sums(groups.examples(ids[..., None])[..., 0], groups.padding_removed(g), M)


class LoraEmbedding:
    """PEFT's embedding, y = ... + s B A[ids].

    G_B[n] = s sum g a^T with a = A[ids]; row v of G_A[n] is the sum of s B^T g over the positions that hold v.
    """

    def __init__(self, module: nn.Module, along: Mapping[tuple[str, str], Along], count: int) -> None:
        self._layer: Any = module
        self._along, self._count = along, count
        self._adapters = sorted({adapter for _, adapter in along})

    def _running(self, ids: torch.Tensor, g: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, Any]]:
        """Yield an adapter, a [..., r], s B^T g [..., r] and s g [..., d]."""
        layer = self._layer
        for adapter in self._adapters:
            if adapter in layer.active_adapters:
                A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
                scaled = g.to(B.dtype) * layer.scaling[adapter]
                if (scale := layer._get_embed_scale()) is not None:
                    scaled = scaled * scale.to(scaled)
                yield adapter, F.embedding(ids, A.T), scaled @ B, scaled

    def by_position(self, call: Call, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ids = call.first
        s = torch.zeros(ids.numel(), self._count, dtype=dtype, device=g.device)
        for adapter, a, h, scaled in self._running(ids, g):
            h = _without_padding(self._layer.base_layer, ids, h)
            for k in range(self._count):
                if (M_A := self._along.get(("lora_embedding_A", adapter))) is not None:
                    s[:, k] += (F.embedding(ids, M_A.to(h)[k].T) * h).to(dtype).sum(-1).flatten()
                if (M_B := self._along.get(("lora_embedding_B", adapter))) is not None:
                    s[:, k] += ((scaled @ M_B.to(scaled)[k]) * a).to(dtype).sum(-1).flatten()
        return s

    def by_example(self, call: Call, g: torch.Tensor, groups: Grouping) -> Iterator[Block]:
        ids = call.first
        for adapter, a, h, scaled in self._running(ids, g):
            if (M_A := self._along.get(("lora_embedding_A", adapter))) is not None:
                h = _without_padding(self._layer.base_layer, ids, h)
                M = None if M_A.empty else M_A.to(h, _sum_type(h)).mT
                yield from _row_sums(groups.examples(ids[..., None])[..., 0], groups.padding_removed(h), M)
            if (M_B := self._along.get(("lora_embedding_B", adapter))) is not None:
                G = torch.bmm(groups.padding_removed(scaled).mT, groups.examples(a.to(scaled.dtype))).flatten(1)
                yield G, None if M_B.empty else M_B.to(G, _sum_type(G)).flatten(1)


def _row_sums(ids: torch.Tensor, g: torch.Tensor, M: torch.Tensor | None) -> Iterator[Block]:
    """Yield what a table [V, d] gets from every example, in its rows that occur.

    Args:
        ids: [B, P].
        g: the gradient where they were looked up, [B, P, d].
        M: the directions, [K, V, d].

    Yields:
        Blocks of columns.
    """
    occurring, index = ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    B, _, d = g.shape
    flat = (index + len(occurring) * torch.arange(B, device=ids.device)[:, None]).flatten()
    columns = max(1, _BLOCK // (B * len(occurring)))
    for start in range(0, d, columns):
        part = g[..., start : start + columns]
        G = g.new_zeros(B * len(occurring), part.shape[-1]).index_add_(0, flat, part.flatten(0, 1))
        mu = None if M is None else M[:, occurring, start : start + columns].flatten(1)
        yield G.view(B, -1), mu


def _without_padding(module: nn.Module, ids: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The row of the padding token gets no gradient."""
    padding = getattr(module, "padding_idx", None)
    return g if padding is None else g * (ids != padding)[..., None]


def _sum_type(t: torch.Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _row(n: int, rows: int, value: Any) -> Any:
    """Return row n of an argument that has rows."""
    if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows:
        return value[n : n + 1]
    return value
