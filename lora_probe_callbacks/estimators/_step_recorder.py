"""What passes by in a training step, example by example: hooks on the forward and on the gradients of outputs.

The gradient hook belongs on the output of the forward that the loss was made of; its inputs are what autograd would
keep of it. Under non-reentrant checkpointing that is nothing: the input is handed to autograd, whose checkpoint drops
it and has it again when the layer was run again. In a reentrant checkpoint the first forward has no graph, and
the second one is seen like any other.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_probe_callbacks.estimators._step_layers import Block, Call, Grouping, Layer

FEW = 2  # directions, for which a product by position is cheaper than the gradients by example

# The example of every row, or how it is read off the arguments of a forward.
ExampleOfRow = torch.Tensor | Callable[[tuple[Any, ...], Mapping[str, Any]], torch.Tensor]


class Keep(torch.autograd.Function):
    """A node that is nobody's successor: its saved tensors live, and come back, as autograd rules."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Save the tensors; the output holds the node."""
        ctx.save_for_backward(*tensors)
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Pass on nothing: no loss is made of the output."""
        del gradients
        return (None, *(None for _ in ctx.saved_tensors))


class Pass:
    """One forward and its backward: a micro-batch.

    Attributes:
        number: In the order of the forwards.
        args: Of the outermost module that was called.
        kwargs: Of the same.
        groups: Which positions are of which example; known when the first gradient arrives.
        by_cell: s by row [K, R] or token [K, R, T], before the rows are summed by example.
        squares: |g_n|^2, [B].
        products: <g_n, g_m>, [B, B].
        summed: |sum_n g_n|^2.
        parameters: ids of those whose gradients are in the squares.
        visited: paths of the layers whose gradient arrived.
        dtypes: The floating types of the gradients.
    """

    def __init__(self, number: int, module: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.number = number
        self.module, self.args, self.kwargs = module, args, kwargs
        self.groups: Grouping | None = None
        self.by_cell: torch.Tensor | None = None
        self.squares: torch.Tensor | None = None
        self.products: torch.Tensor | None = None
        self.summed: torch.Tensor | None = None
        self.parameters: set[int] = set()
        self.visited: set[str] = set()
        self.dtypes: set[torch.dtype] = set()


class Recorder:
    """Watches layers while it is installed.

    Args:
        layers: What to watch.
        frames: The modules around all of them, of which the outermost one that is called makes a pass.
        count: K directions.
        dtype: What is summed in.
        example_of_row: See `per_example_scores`.
        norms: Whether to sum |g_n|^2.
        gram: Whether to sum <g_n, g_m>.
        per_token: Whether to keep s by position.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        frames: Sequence[nn.Module],
        count: int,
        dtype: torch.dtype,
        example_of_row: ExampleOfRow | None,
        *,
        norms: bool,
        gram: bool,
        per_token: bool,
    ) -> None:
        self._layers, self._frames = layers, frames
        self._count, self._dtype = count, dtype
        self._example_of_row = example_of_row
        self._norms, self._gram, self._per_token = norms, gram, per_token
        self.passes: list[Pass] = []
        self.error: Exception | None = None  # the first of our own; it must not break the backward
        self._depth = 0
        self._reached: tuple[int, set[int]] = (-1, set())  # a backward, and the passes that it has begun in
        self._own = False  # a rule runs a layer again
        self._leaf = torch.zeros((), requires_grad=True)
        self._handles: list[Any] = []
        self._of_frames: list[Any] = []
        self._open: weakref.WeakSet[_Kept] = weakref.WeakSet()
        self._removed = False

    def install(self) -> None:
        """Watch."""
        for module in self._frames:
            self._of_frames.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
            self._of_frames.append(module.register_forward_hook(self._leave, always_call=True))
        for layer in self._layers:
            hook = functools.partial(self._ran, layer)
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take all hooks away; those that a checkpoint still counts on, as soon as its graph is gone."""
        self._removed = True
        while self._of_frames:
            self._of_frames.pop().remove()
        if waiting := list(self._open):
            for kept in waiting:
                weakref.finalize(kept, _remove_at_last, self._open, self._handles)
        else:
            _remove_at_last(self._open, self._handles)

    # --- forwards ---------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A frame begins to run."""
        if torch.is_grad_enabled() and not in_backward():
            self._depth += 1
            if self._depth == 1:
                self.passes.append(Pass(len(self.passes), module, args, kwargs))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled() and not in_backward():
            self._depth = max(0, self._depth - 1)
            if self._depth == 0 and self.passes:
                for tensor in tensors_of(output):
                    tensor.register_hook(functools.partial(self._begins, self.passes[-1]))  # type: ignore[no-untyped-call]

    def _begins(self, now: Pass, gradient: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if self._reached[0] != task:
            self._reached = task, set()
        self._reached[1].add(now.number)

    def _ran(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        if self._own or not isinstance(y, torch.Tensor) or not y.requires_grad:
            return
        if not self.passes:
            self.passes.append(Pass(0, None, (), {}))
        kept: Any
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            kept = Call(args, kwargs)
        else:
            # Whatever has happened: a checkpoint counts what was saved, the first and the second time. And not in a
            # `try`: it stops its second time by raising from within.
            kept = _Kept(args, kwargs, self._leaf)
            self._open.add(kept)
        if not self._removed:
            arrived = functools.partial(self._arrived, self._pass_of_now(), layer, [kept])
            y.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _pass_of_now(self) -> Pass | None:
        """Return the pass that a forward belongs to, or None if it cannot be told."""
        if not in_backward() or len(self.passes) == 1:
            return self.passes[-1]
        # In a reentrant checkpoint; the one whose backward runs.
        numbers = self._reached[1]
        return self.passes[next(iter(numbers))] if len(numbers) == 1 else None

    # --- gradients --------------------------------------------------------------------------

    def _arrived(self, now: Pass | None, layer: Layer, kept: list[Any], g: torch.Tensor) -> None:
        call = kept.pop() if kept else None  # let go of it, whatever the graph does
        if self.error is not None:
            return
        try:
            if call is None:
                raise NotImplementedError(
                    f"{layer.path} got a second gradient of one forward (backward with retain_graph); expected one "
                    "backward for each forward"
                )
            if now is None:
                raise NotImplementedError(
                    f"{layer.path} ran again in the backward of several forwards at once, and reentrant checkpoints do "
                    "not tell which; use checkpointing with use_reentrant=False, or one backward for each forward"
                )
            if isinstance(call, _Kept):
                call = call.unpacked()
            self._own = True
            device = g.device.type
            with torch.no_grad():
                if torch.is_autocast_enabled(device):  # a backward called inside autocast
                    with torch.autocast(device, enabled=False):
                        self._add(now, layer, call, g)
                else:
                    self._add(now, layer, call, g)
        except Exception as error:  # told when the step is over: the gradients of the training are right
            self.error = error
        finally:
            self._own = False

    def _add(self, now: Pass, layer: Layer, call: Call, g: torch.Tensor) -> None:
        groups = self._groups(now, layer, g)
        now.visited.add(layer.path)
        now.dtypes.add(g.dtype)
        squares = self._norms or self._gram
        if squares:
            ids = {id(p) for p in layer.parameters}
            if now.parameters & ids:
                raise NotImplementedError(
                    f"{layer.path} ran twice in one forward, or shares a parameter with another layer: its gradients "
                    "would have to be added before they are squared. Leave norms and gram off"
                )
            now.parameters |= ids
        by_position = self._count and layer.directed and (self._per_token or not (squares or self._count > FEW))
        if by_position:
            part = layer.rule.by_position(call, g, self._dtype).T  # [K, positions]
            part = part.reshape(self._count, groups.cells, -1)
            self._add_scores(now, layer, groups, part)
        if squares or (layer.directed and not by_position):
            for block in layer.rule.by_example(call, g, groups):
                self._add_block(now, block, scores=not by_position, squares=squares)

    def _add_scores(self, now: Pass, layer: Layer, groups: Grouping, part: torch.Tensor) -> None:
        if not self._per_token or len(groups.rows) == 2:
            part = part.sum(-1)
        if now.by_cell is None:
            now.by_cell = part
        elif now.by_cell.shape != part.shape:
            raise ValueError(
                f"{layer.path} has {part.shape[-1]} positions to a row, and layers before it {now.by_cell.shape[-1]}; "
                "scores per token need layers that all see the tokens. Leave it out of the directions"
            )
        else:
            now.by_cell += part.to(now.by_cell.device)

    def _add_block(self, now: Pass, block: Block, *, scores: bool, squares: bool) -> None:
        G, mu = block
        G = G.to(self._dtype)
        if scores and mu is not None:
            s = (G @ mu.to(self._dtype).T).T
            now.by_cell = s if now.by_cell is None else now.by_cell + s.to(now.by_cell.device)
        if not squares:
            return
        summed = G.sum(0).square().sum()
        now.summed = summed if now.summed is None else now.summed + summed.to(now.summed.device)
        if self._gram:
            products = G @ G.T
            now.products = products if now.products is None else now.products + products.to(now.products.device)
        else:
            lengths = torch.linalg.vector_norm(G, dim=1).square()
            now.squares = lengths if now.squares is None else now.squares + lengths.to(now.squares.device)

    def _groups(self, now: Pass, layer: Layer, g: torch.Tensor) -> Grouping:
        if now.groups is None:
            now.groups = self._first_groups(now, g)
        rows = now.groups.rows
        if g.shape[: len(rows)] != rows or g.dim() < len(rows) + 1:
            raise ValueError(
                f"{layer.path} has an output of shape {tuple(g.shape)}, expected {tuple(rows)} rows first: one per "
                "example, or as example_of_row says. Rows that are regrouped inside the model (sequence first, "
                "flattened or gathered tokens, experts) cannot be told apart here: give example_of_row, leave the "
                "layer out of the directions, or use per_prompt_projection(backend='loop')"
            )
        return now.groups

    def _first_groups(self, now: Pass, g: torch.Tensor) -> Grouping:
        given = self._example_of_row
        if given is None:
            return Grouping(g.shape[:1], None, len(g))
        of_row = given if isinstance(given, torch.Tensor) else given(now.args, now.kwargs)
        if of_row.dim() not in {1, 2} or of_row.is_floating_point() or not of_row.numel() or int(of_row.min()) < 0:
            raise ValueError(
                f"got example_of_row of shape {tuple(of_row.shape)} and {of_row.dtype}, expected the numbers 0..B-1 of "
                "the examples, [R] by row or [R, T] by token"
            )
        return Grouping(of_row.shape, of_row.to(g.device), int(of_row.max()) + 1)


class _Kept:
    """A layer's arguments whose tensors are in autograd's hands.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        leaf: Any leaf that requires a gradient.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], leaf: torch.Tensor) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        self._args = tuple(_HOLE if isinstance(value, torch.Tensor) else value for value in args)
        self._kwargs = {n: _HOLE if isinstance(value, torch.Tensor) else value for n, value in kwargs.items()}
        with torch.enable_grad():
            self._node: Any = Keep.apply(leaf, *(t.detach() for t in tensors)).grad_fn  # type: ignore[no-untyped-call]

    def unpacked(self) -> Call:
        """Return the arguments; a checkpoint has run the layer again by now, or does so."""
        try:
            tensors = iter(self._node.saved_tensors)
        except RuntimeError as error:  # seen with torch 2.11, and not with 2.13
            raise NotImplementedError(
                f"torch {torch.__version__} lets go of what a checkpoint with use_reentrant=False keeps before the "
                "gradient of its output is there; use torch 2.13, use_reentrant=True, or per_prompt_projection"
            ) from error
        args = tuple(next(tensors) if value is _HOLE else value for value in self._args)
        return Call(args, {n: next(tensors) if value is _HOLE else value for n, value in self._kwargs.items()})


_HOLE = object()


def _remove_at_last(still_open: weakref.WeakSet[_Kept], handles: list[Any]) -> None:
    if not list(still_open):  # its length counts the one that is just going
        while handles:
            handles.pop().remove()


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Return the tensors with a graph in what a module returned."""
    leaves = torch.utils._pytree.tree_leaves(output if not isinstance(output, Mapping) else dict(output))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def in_backward() -> bool:
    """Return whether a backward is running in this thread."""
    return torch._C._current_graph_task_id() != -1
