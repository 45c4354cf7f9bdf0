"""Per-example scores of the very training step: s_n = <g_n, mu>, |g_n| and <g_n, g_m>, as it passes by."""

from __future__ import annotations

import contextlib
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
from lora_probe_callbacks.estimators._step_names import Identities, arguments_of, called, groups_of, token_rows
from lora_probe_callbacks.estimators._step_recorder import FEW, ExampleOfRow, Pass, Recorder
from lora_probe_callbacks.estimators.directions import UpdateDirection
from lora_probe_callbacks.restore.tree import Tree, tree

__all__ = ["ExampleScores", "InStep", "per_example_scores"]

Direction = UpdateDirection | Mapping[str, torch.Tensor]
SelfCheck = Literal["first", "always", "never"]


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
    step = InStep(
        model,
        directions,
        norms=norms,
        gram=gram,
        per_token=per_token,
        example_of_row=example_of_row,
        ids=ids,
        self_check=self_check,
    )
    step.start()
    try:
        yield step.scores
    finally:
        step.stop()
    step.finish()


class InStep:
    """`per_example_scores` in two parts, for those whom hooks tell when a step begins and ends.

    Args:
        model: As there.
        directions: As there.
        norms: As there.
        gram: As there.
        per_token: As there.
        example_of_row: As there.
        ids: As there.
        self_check: As there.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Direction | Sequence[Direction] | Mapping[str, Direction],
        *,
        norms: bool,
        gram: bool = False,
        per_token: bool = False,
        example_of_row: ExampleOfRow | None = None,
        ids: Identities | None = None,
        self_check: SelfCheck = "first",
    ) -> None:
        if self_check not in {"first", "always", "never"}:
            raise ValueError(f"got self_check={self_check!r}, expected 'first', 'always' or 'never'")
        self._inside = inside = tree(unwrapped(model))
        _refuse_compiled(model, inside)
        refuse_coupling(inside)
        named = _named_directions(directions)
        names = inside.names if model is inside.root else inside.names | tree(model).names
        self._mus = mus = [_by_owner(mu, names, inside) for mu in named.values()]
        wanted = {i: p for p in inside.parameters.values() if (i := id(p)) in set().union(*mus)}
        if norms or gram:
            wanted |= {id(p): p for p in inside.parameters.values() if p.requires_grad}
        if not wanted:
            raise ValueError("got no directions, and neither norms nor gram; expected something to compute")
        self._wanted = wanted
        lengths = [_length(mu) for mu in mus]
        # Powers of two, exact: an update of 1e-8 would vanish in the float16 of some layers.
        self._units = units = [2.0 ** math.frexp(length)[1] if length else 1.0 for length in lengths]
        self._layers = plan(inside, [_divided(mu, unit) for mu, unit in zip(mus, units, strict=True)], wanted)
        scales = [mu.scale if isinstance(mu, UpdateDirection) else 1.0 for mu in named.values()]
        self.scores = ExampleScores(list(named), scales, lengths)
        self._per_token, self._squares, self._ids = per_token, norms or gram, ids
        self.frames = _frames(inside, self._layers)  # the modules around all layers, from the outside in
        self._recorder = Recorder(
            self._layers,
            self.frames,
            len(mus),
            precision(inside),
            example_of_row,
            norms=norms,
            gram=gram,
            per_token=per_token,
        )
        asked = (len(mus) > 0, norms, gram, per_token, example_of_row is None)
        self._key = (*asked, inside.root.training, hash(tuple(wanted)))
        self._check: SelfCheck = self_check
        self._first = _self_check.first_use(inside.root, per_example_scores, self._key)
        self._wrappers = wrappers(model)
        self._rehearsal: Rehearsal | None = None
        self._before: dict[int, tuple[torch.Tensor | None, int | None]] = {}

    def start(self) -> None:
        """Watch the step that begins."""
        if self._check == "always" or (self._check == "first" and self._first):
            self._rehearsal = Rehearsal(self._inside, self._wrappers, self._layers, self.frames)
        self._before = {i: (p.grad, None if p.grad is None else p.grad._version) for i, p in self._wanted.items()}
        self._recorder.install()

    def joins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a forward that has begun already, before its layers: hooks of a module that runs do not fire.

        Args:
            module: The module.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        self._recorder.enter(module, args, kwargs)
        if self._rehearsal is not None:
            self._rehearsal.enter(module, args)

    @property
    def seen(self) -> bool:
        """A forward was watched, and gradients of it have arrived."""
        return any(now.visited for now in self._recorder.passes) or self._recorder.error is not None

    def stop(self) -> None:
        """Take the hooks away."""
        self._recorder.remove()
        if self._rehearsal is not None:
            self._rehearsal.remove()

    def finish(self) -> ExampleScores:
        """Put together what was seen, before the optimizer steps.

        Returns:
            The scores.

        Raises:
            ValueError: If rows are not what they were taken for.
            NotImplementedError: If a layer was used in a way that cannot be followed.
            RuntimeError: If no gradient passed by, or the self-check fails.
        """
        scores, passes = self.scores, self._recorder.passes
        if self._recorder.error is not None:
            raise self._recorder.error
        _refuse_unseen(self._recorder, self._layers, self._before)
        _fill(scores, passes, torch.tensor(self._units), per_token=self._per_token, norms=self._squares)
        scores.ids = called(self._ids, passes)
        scores.checked = not self._first
        if self._rehearsal is not None:
            found = None if scores.s is None else scores.s[:, : scores.passes[0]]
            scores.why_unchecked = self._rehearsal.check(passes[0], self._mus, found)
            scores.checked = scores.why_unchecked is None
            if scores.checked:
                _self_check.passed(self._inside.root, per_example_scores, self._key)
            elif self._check == "always":
                raise NotImplementedError(f"self_check='always' cannot be done: {scores.why_unchecked}")
        return scores

    def texts(self, examples: Sequence[int], decode: Callable[[list[int]], str]) -> dict[int, str]:
        """Return the text of some examples, where their `input_ids` passed by.

        Args:
            examples: Their numbers in the scores.
            decode: A tokenizer's.

        Returns:
            Text by number.
        """
        found: dict[int, str] = {}
        start = 0
        for now in self._recorder.passes:
            groups = groups_of(now)
            mine = [n for n in examples if start <= n < start + groups.count]
            ids = arguments_of(now).get("input_ids") if mine else None
            if isinstance(ids, torch.Tensor):
                rows = token_rows(ids, arguments_of(now), groups)
                found |= {n: decode(rows[n - start]) for n in mine}
            start += groups.count
        return found


def _length(mu: Mapping[int, torch.Tensor]) -> float:
    norms = torch._foreach_norm(list(mu.values()))
    return math.sqrt(
        sum(value**2 for value in torch.stack([n.to(norms[0].device, torch.float64) for n in norms]).tolist())
    )


def _divided(mu: Mapping[int, torch.Tensor], unit: float) -> dict[int, torch.Tensor]:
    return dict(zip(mu, torch._foreach_div(list(mu.values()), unit), strict=True))


def _fill(scores: ExampleScores, passes: list[Pass], units: torch.Tensor, *, per_token: bool, norms: bool) -> None:
    """Put the passes together."""
    groups = [groups_of(now) for now in passes]
    scores.passes = [group.count for group in groups]
    by_example = (norms or len(scores.directions) > FEW) and not per_token
    if scores.directions:
        parts = [_scores(now, group, by_example) for now, group in zip(passes, groups, strict=True)]
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
