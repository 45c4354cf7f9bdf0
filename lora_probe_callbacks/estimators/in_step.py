"""Per-example scores of the very training step: s_n = <g_n, mu>, |g_n| and <g_n, g_m>, as it passes by."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lora_probe_callbacks.estimators import _self_check
from lora_probe_callbacks.estimators._backends import precision
from lora_probe_callbacks.estimators._doubled_rank import refuse_coupling
from lora_probe_callbacks.estimators._owners import described, unwrapped, wrappers
from lora_probe_callbacks.estimators._step_check import Rehearsal
from lora_probe_callbacks.estimators._step_layers import Grouping, Layer, plan
from lora_probe_callbacks.estimators._step_recorder import ExampleOfRow, Pass, Recorder
from lora_probe_callbacks.estimators.directions import UpdateDirection
from lora_probe_callbacks.restore.tree import Tree, tree

__all__ = ["ExampleScores", "per_example_scores"]

Direction = UpdateDirection | Mapping[str, torch.Tensor]
SelfCheck = Literal["first", "always", "never"]
Identities = str | Callable[[tuple[Any, ...], Mapping[str, Any]], Sequence[Any]]


class ExampleScores:
    """What the examples of one step are to the step; filled when the context ends.

    With L the loss that `backward` was called on, g_n is the part of its gradient that came through the rows of
    example n: `sum_n g_n` is the gradient. **Whatever L was divided by is in it**: the number of tokens, of
    examples, of accumulated micro-batches; and what it was multiplied with, a gradient scaler's scale. What comes after
    the backward is not: clipping, and the averaging over ranks (`gathered` does that).

    Attributes:
        directions: Names of the K directions.
        scales: Their scales: the step that direction k stands for is `scales[k] * mu_k`, [K].
        s: <g_n, mu_k>, [K, B], examples in the order of the forwards; None until the context has ended.
        tokens: The same by position, [K, R, T] for rows [R] of tokens, padded with 0 over micro-batches; or None.
        norms: |g_n|, [B], or None.
        gram: <g_n, g_m>, [B, B], nan between examples of different micro-batches, or None.
        ids: What each example is called.
        passes: Number of examples of each forward.
        summed: |sum_n g_n| of each forward, where norms are known.
        mu_norms: |mu_k|, [K].
        checked: True if compared with an ordinary backward, now or at the first use; else False.
        why_unchecked: Why not.
    """

    def __init__(self, directions: Sequence[str], scales: Sequence[float], mu_norms: Sequence[float]) -> None:
        self.directions = tuple(directions)
        self.scales = torch.tensor(scales, dtype=torch.float64)
        self.mu_norms = torch.tensor(mu_norms, dtype=torch.float64)
        self.s: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None
        self.norms: torch.Tensor | None = None
        self.gram: torch.Tensor | None = None
        self.ids: list[Any] = []
        self.passes: list[int] = []
        self.summed: list[float] = []
        self.checked = False
        self.why_unchecked: str | None = None

    @property
    def gain(self) -> torch.Tensor:
        """`-scale * s`, [K, B]: how much the step lowers example n's part of the loss, to first order.

        Negative: the example pulls against the step.

        Raises:
            RuntimeError: If it is read inside the context.
        """
        if self.s is None:
            raise RuntimeError("the scores are there when the context has ended; expected to be read after it")
        return -self.scales.to(self.s)[:, None] * self.s

    def gathered(self) -> ExampleScores:
        """Join the examples of all ranks, in the order of the ranks; every rank must call it.

        DDP and FSDP average gradients: all is divided by the number of ranks, so that the sum of g_n is the gradient
        that the optimizer gets. Tokens stay with their rank.

        Returns:
            The joined scores, on the CPU; on one rank a copy.
        """
        parts: list[Any] = [self._portable()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self._portable())
        ranks = len(parts)
        whole = ExampleScores(self.directions, self.scales.tolist(), self.mu_norms.tolist())
        if self.s is not None:
            whole.s = torch.cat([part["s"] for part in parts], dim=1) / ranks
        if self.norms is not None:
            whole.norms = torch.cat([part["norms"] for part in parts]) / ranks
        if self.gram is not None:
            whole.gram = _block_diagonal([part["gram"] for part in parts]) / ranks**2
        whole.ids = [name for part in parts for name in part["ids"]]
        whole.passes = [count for part in parts for count in part["passes"]]
        whole.summed = [norm / ranks for part in parts for norm in part["summed"]]
        whole.checked = all(part["checked"] for part in parts)
        whole.why_unchecked = self.why_unchecked
        return whole

    def _portable(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in ("s", "norms", "gram")}
        return {
            **{name: None if t is None else t.cpu() for name, t in tensors.items()},
            **{name: getattr(self, name) for name in ("ids", "passes", "summed", "checked")},
        }


@contextlib.contextmanager
def per_example_scores(
    model: nn.Module,
    directions: Direction | Sequence[Direction] | Mapping[str, Direction] = (),
    *,
    norms: bool = False,
    gram: bool = False,
    per_token: bool = False,
    example_of_row: ExampleOfRow | None = None,
    ids: Identities | None = None,
    self_check: SelfCheck = "first",
) -> Iterator[ExampleScores]:
    """Score every example of a training step while its forward and backward run.

        with per_example_scores(model, direction) as scores:
            loss = model(**batch).loss
            loss.backward()
        scores.s  # [K, B]

    All that is needed passes by in the step. For a layer y = W x with the gradient g at its output and a direction M,

        s_n = sum_t <g[n,t], M x[n,t]>,    |g_n|^2 = |sum_t g[n,t] x[n,t]^T|^2

    summed over the layers, are exact. The step itself runs as it would: every tensor of it is the same, bit by bit.
    Several forwards inside are micro-batches. Forward and backward must both be inside, the optimizer's step after it.

    Args:
        model: The module that is trained, or a data-parallel wrapper around it.
        directions: One or several, each an `UpdateDirection` of this model or tensors by parameter name (a
            step, of scale 1); a mapping of names to directions; or none, with norms or gram.
        norms: |g_n| over all trainable parameters.
        gram: <g_n, g_m> over all trainable parameters, within a micro-batch.
        per_token: s by position as well.
        example_of_row: The example 0..B-1 of each row of a forward [R], or of each token [R, T] if rows are packed;
            or a function of the forward's arguments `(args, kwargs)` that returns it. By default rows are examples.
        ids: What examples are called: the name of an argument of the forward that holds a value for each, "content"
            for a hash of their `input_ids`, or a function of `(args, kwargs)`; by default they are counted.
        self_check: When to run the first forward again and compare with an ordinary backward, its examples weighted at
            random: at the "first" use of a model, "always" or "never". Where it cannot be done, `checked` is False.

    Yields:
        The scores, which are filled on exit.

    Raises:
        ValueError: If an argument does not fit the model, or rows are not what they were taken for.
        NotImplementedError: If a layer has no rule, or the model is compiled.
        RuntimeError: If no gradient passed by.
    """
    if self_check not in {"first", "always", "never"}:
        raise ValueError(f"got self_check={self_check!r}, expected 'first', 'always' or 'never'")
    inside = tree(unwrapped(model))
    _refuse_compiled(model, inside)
    refuse_coupling(inside)
    named = _named_directions(directions)
    names = inside.names if model is inside.root else inside.names | tree(model).names
    mus = [_by_owner(mu, names, inside) for mu in named.values()]
    wanted = {i: p for p in inside.parameters.values() if (i := id(p)) in set().union(*mus)}
    if norms or gram:
        wanted |= {id(p): p for p in inside.parameters.values() if p.requires_grad}
    if not wanted:
        raise ValueError("got no directions, and neither norms nor gram; expected something to compute")
    scales = [mu.scale if isinstance(mu, UpdateDirection) else 1.0 for mu in named.values()]
    lengths = torch._foreach_norm([t for mu in mus for t in mu.values()]) if mus else []
    pieces = iter([float(length) for length in lengths])
    mu_norms = [math.sqrt(sum(next(pieces) ** 2 for _ in mu)) for mu in mus]
    # Powers of two, exact: an update of 1e-8 would vanish in the float16 of some layers.
    units = [2.0 ** math.frexp(norm)[1] if norm else 1.0 for norm in mu_norms]
    scaled = [
        dict(zip(mu, torch._foreach_div(list(mu.values()), unit), strict=True))
        for mu, unit in zip(mus, units, strict=True)
    ]
    layers = plan(inside, scaled, wanted)
    frames = _frames(inside, layers)
    scores = ExampleScores(list(named), scales, mu_norms)
    options = {"norms": norms, "gram": gram, "per_token": per_token}
    recorder = Recorder(layers, frames, len(mus), precision(inside), example_of_row, **options)
    key = (len(mus) > 0, *options.values(), example_of_row is None, inside.root.training, hash(tuple(wanted)))
    first = _self_check.first_use(inside.root, per_example_scores, key)
    checks = self_check == "always" or (self_check == "first" and first)
    rehearsal = Rehearsal(inside, wrappers(model), layers, frames) if checks else None
    before = {i: (p.grad, None if p.grad is None else p.grad._version) for i, p in wanted.items()}
    recorder.install()
    try:
        yield scores
    finally:
        recorder.remove()
        if rehearsal is not None:
            rehearsal.remove()
    if recorder.error is not None:
        raise recorder.error
    _refuse_unseen(recorder, layers, before)
    _fill(scores, recorder.passes, torch.tensor(units), per_token=per_token, norms=norms or gram)
    scores.ids = _called(ids, recorder.passes)
    scores.checked = not first
    if rehearsal is not None:
        now = recorder.passes[0]
        found = None if scores.s is None else scores.s[:, : scores.passes[0]]
        scores.why_unchecked = rehearsal.check(now, mus, found)
        scores.checked = scores.why_unchecked is None
        if scores.checked:
            _self_check.passed(inside.root, per_example_scores, key)
        elif self_check == "always":
            raise NotImplementedError(f"self_check='always' cannot be done: {scores.why_unchecked}")


def _fill(scores: ExampleScores, passes: list[Pass], units: torch.Tensor, *, per_token: bool, norms: bool) -> None:
    """Put the passes together."""
    groups = [_groups(now) for now in passes]
    scores.passes = [group.count for group in groups]
    if scores.directions:
        parts = [_scores(now, group, norms and not per_token) for now, group in zip(passes, groups, strict=True)]
        scores.s = torch.cat([part.to(parts[0].device) for part in parts], dim=1) * units.to(parts[0])[:, None]
    if scores.directions and per_token:
        by_token = [_by_token(now, group) for now, group in zip(passes, groups, strict=True)]
        longest = max(part.shape[-1] for part in by_token)
        padded = [torch.nn.functional.pad(part, (0, longest - part.shape[-1])) for part in by_token]
        scores.tokens = (
            torch.cat([part.to(padded[0].device) for part in padded], 1) * units.to(padded[0])[:, None, None]
        )
    if norms:
        squares = [now.squares if now.products is None else now.products.diagonal() for now in passes]
        scores.norms = torch.cat([s.to(squares[0].device) for s in squares]).clamp_min(0).sqrt()  # type: ignore[union-attr]
        scores.summed = [math.sqrt(float(now.summed)) for now in passes]  # type: ignore[arg-type]
        if passes[0].products is not None:
            scores.gram = _block_diagonal([now.products for now in passes])  # type: ignore[misc]


def _groups(now: Pass) -> Grouping:
    assert now.groups is not None
    return now.groups


def _scores(now: Pass, groups: Grouping, by_example: bool) -> torch.Tensor:
    """Return the scores of a pass by example, [K, B]."""
    found = now.by_cell
    assert found is not None
    if by_example:
        return found
    if len(groups.rows) == 1 and found.dim() == 3:  # [K, R, T]
        found = found.sum(-1)
    return groups.fold(found.flatten(1).T).T


def _by_token(now: Pass, groups: Grouping) -> torch.Tensor:
    found = now.by_cell
    assert found is not None
    return found.view(len(found), *groups.rows) if len(groups.rows) == 2 else found


def _block_diagonal(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    size = sum(len(block) for block in blocks)
    whole = blocks[0].new_full((size, size), math.nan)
    start = 0
    for block in blocks:
        end = start + len(block)
        whole[start:end, start:end] = block
        start = end
    return whole


# --- what was asked for -----------------------------------------------------------------------


def _named_directions(given: Direction | Sequence[Direction] | Mapping[str, Direction]) -> dict[str, Direction]:
    if isinstance(given, UpdateDirection):
        return {given.source: given}
    if isinstance(given, Mapping):
        if given and all(isinstance(value, torch.Tensor) for value in given.values()):
            return {"direction": given}  # type: ignore[dict-item]
        return dict(given)  # type: ignore[arg-type]
    sources = [mu.source if isinstance(mu, UpdateDirection) else "direction" for mu in given]
    return {
        source if sources.count(source) == 1 else f"{source}_{number}": mu
        for number, (source, mu) in enumerate(zip(sources, given, strict=True))
    }


def _by_owner(direction: Direction, names: Mapping[str, nn.Parameter], inside: Tree) -> dict[int, torch.Tensor]:
    """Return mu by id of the parameter, without tensors that are zero."""
    if isinstance(direction, UpdateDirection):
        owners: Mapping[str, nn.Parameter] = direction.owned_by(inside)
        tensors: Mapping[str, torch.Tensor] = direction.tensors
    else:
        owners, tensors = names, direction
    if not tensors:
        raise ValueError("got an empty direction, expected tensors by parameter name")
    mu = {}
    for name, tensor in tensors.items():
        if name not in owners:
            raise ValueError(f"got {name!r}, expected a parameter of {described(inside.root)}")
        if tensor.shape != owners[name].shape:
            raise ValueError(f"{name} got shape {tuple(tensor.shape)}, expected {tuple(owners[name].shape)}")
        full = tensor.detach()
        whole: torch.Tensor = full.full_tensor() if hasattr(full, "full_tensor") else full
        mu[id(owners[name])] = whole if whole.is_floating_point() else whole.double()
    largest = torch._foreach_norm(list(mu.values()), math.inf)
    sizes = dict(zip(mu, torch.stack([t.to(largest[0].device, torch.float64) for t in largest]).tolist(), strict=True))
    if not all(map(math.isfinite, sizes.values())):
        raise ValueError("got NaN or infinity in a direction; a step whose gradients overflowed has none")
    return {i: t for i, t in mu.items() if sizes[i]} or mu


def _frames(inside: Tree, layers: Sequence[Layer]) -> list[nn.Module]:
    """Return the modules around all layers, from the outside in."""
    paths = [layer.path.split(".")[:-1] for layer in layers if layer.path]
    shared = [parts[0] for parts in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*paths, strict=False))]
    return [inside.root, *(inside.root.get_submodule(".".join(shared[: i + 1])) for i in range(len(shared)))]


def _refuse_compiled(model: nn.Module, inside: Tree) -> None:
    compiled = [m for m in (*wrappers(model), *inside.modules.values()) if m._compiled_call_impl is not None]
    if compiled or any(type(m).__name__ == "OptimizedModule" for m in (*wrappers(model), *inside.modules.values())):
        raise NotImplementedError(
            "the model is compiled, and a compiled call runs no hooks of its layers (torch 2.13); use "
            "per_prompt_projection, which runs the layers as they are written, or train without torch.compile"
        )


def _refuse_unseen(
    recorder: Recorder, layers: Sequence[Layer], before: Mapping[int, tuple[torch.Tensor | None, int | None]]
) -> None:
    """Refuse what would be a part of the truth: a gradient that came by another way than through a layer's output."""
    passes = recorder.passes
    if not any(now.visited for now in passes):
        raise RuntimeError(
            f"no gradient passed by {len(layers)} layers, {layers[0].path} first; expected a forward of the model that "
            "owns them and its backward, both inside the context, the adapter active and not merged"
        )
    if silent := [now.number for now in passes if not now.visited]:
        # A forward that no loss was made of (a reference, a rollout with gradients enabled).
        passes[:] = [now for now in passes if now.number not in silent]
    visited = set().union(*(now.visited for now in passes))
    for layer in layers:
        for p in layer.parameters if layer.path not in visited else ():
            former, version = before[id(p)]
            if p.grad is not None and (p.grad is not former or p.grad._version != version):
                raise NotImplementedError(
                    f"{layer.path} ({type(layer.module).__name__}) got a gradient without being called: its weights "
                    "are used outside of it (a fused kernel, a parametrisation). Leave it out, or use "
                    "per_prompt_projection(backend='loop')"
                )


# --- what examples are called -----------------------------------------------------------------


def _called(ids: Identities | None, passes: Sequence[Pass]) -> list[Any]:
    if ids is None:
        return list(range(sum(_groups(now).count for now in passes)))
    names: list[Any] = []
    for now in passes:
        mine = _called_in(ids, now)
        if len(mine) != _groups(now).count:
            raise ValueError(f"ids got {len(mine)} names for {_groups(now).count} examples of a forward")
        names += mine
    return names


def _called_in(ids: Identities, now: Pass) -> list[Any]:
    if not isinstance(ids, str):
        return list(ids(now.args, now.kwargs))
    arguments: Mapping[str, Any] = {
        **(now.args[0] if now.args and isinstance(now.args[0], Mapping) else {}),
        **now.kwargs,
    }
    if ids != "content":
        if ids not in arguments:
            raise ValueError(f"ids got {ids!r}, expected an argument of the forward, such as {list(arguments)[:4]}")
        column = arguments[ids]
        return list(column.tolist() if isinstance(column, torch.Tensor) else column)
    integers = [
        v for v in (arguments.get("input_ids"), *now.args) if isinstance(v, torch.Tensor) and not v.is_floating_point()
    ]
    if not integers:
        raise ValueError("ids='content' needs input_ids among the arguments of the forward; expected integer tokens")
    return [
        hashlib.blake2b(row, digest_size=6).hexdigest() for row in token_bytes(integers[0], arguments, _groups(now))
    ]


def token_rows(tokens: torch.Tensor, arguments: Mapping[str, Any], groups: Grouping) -> list[list[int]]:
    """Return the tokens of every example, without padding where an attention mask tells.

    Args:
        tokens: [R, T].
        arguments: of the forward.
        groups: which row is of which example.

    Returns:
        Tokens by example.
    """
    mask = arguments.get("attention_mask")
    known = isinstance(mask, torch.Tensor) and mask.shape == tokens.shape
    cells = tokens.reshape(groups.cells, -1).tolist()
    kept = mask.reshape(groups.cells, -1).tolist() if known and isinstance(mask, torch.Tensor) else None
    of = range(groups.cells) if groups.example_of_row is None else groups.example_of_row.flatten().tolist()
    rows: list[list[int]] = [[] for _ in range(groups.count)]
    for number, (example, cell) in enumerate(zip(of, cells, strict=True)):
        rows[example] += cell if kept is None else [t for t, real in zip(cell, kept[number], strict=True) if real]
    return rows


def token_bytes(tokens: torch.Tensor, arguments: Mapping[str, Any], groups: Grouping) -> list[bytes]:
    """Return `token_rows` as bytes."""
    return [
        b"".join(t.to_bytes(8, "little", signed=True) for t in row) for row in token_rows(tokens, arguments, groups)
    ]
