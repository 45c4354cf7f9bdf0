"""Which leaf tensors the graph of an output leads to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch.utils.checkpoint import CheckpointFunction

from lora_probe_callbacks._gc import no_collection

__all__ = [
    "Walk",
    "backwards_so_far",
    "capturing",
    "cut_by_checkpoint",
    "in_backward",
    "mark",
    "runs_to_all",
    "walk",
    "walk_from_here",
]

_MARK = "lora_probe_callbacks"

# Nodes that hide a graph (reentrant checkpointing re-runs its part inside the backward) or that
# pretend to one (a compiled region is one node that leads to every parameter it was given).
_BLIND = ("CheckpointFunction", "CompiledFunction", "CompiledBlock")

# What torch puts in the place of the backward that an operator lacks: it warns once, and passes nothing on
# (torch/csrc/autograd/autograd_not_implemented_fallback.cpp, torch 2.13).
_DROPS = "WarnNotImplemented"


def capturing() -> bool:
    """Tell whether this step is being captured as a CUDA graph: nothing may wait for the device, or be kept of it."""
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(initialized) and torch.cuda.is_current_stream_capturing()


def in_backward() -> bool:
    """Tell whether this thread is inside an autograd backward, as a recomputed forward is."""
    return torch._C._current_graph_task_id() != -1


def backwards_so_far() -> int | None:
    """How many backward passes this process has made, this look included.

    Autograd numbers its passes. Two looks whose numbers follow each other have no other pass in between.

    Returns:
        The number of this one, or None where it cannot be told.
    """
    seen: list[int] = []
    with contextlib.suppress(RuntimeError), torch.inference_mode(False), torch.enable_grad():
        one = torch.zeros((), device="cpu", requires_grad=True)
        one.register_hook(lambda _: seen.append(torch._C._current_graph_task_id()))  # type: ignore[no-untyped-call]
        torch.autograd.backward(one)
    return seen[0] if seen else None


_CHECKPOINT = CheckpointFunction.forward.__code__


def cut_by_checkpoint() -> bool:
    """Tell whether a reentrant checkpoint is running none of whose inputs requires gradients: it has no backward."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _CHECKPOINT:
            inputs = frame.f_locals["args"]
            return not any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs)
        frame = frame.f_back
    return False


@dataclass(eq=False, slots=True)
class Walk:
    """What a graph leads to.

    Attributes:
        leaves: The leaf tensors reached, by id.
        marks: What :func:`mark` has left on the way, each once.
        blind: Why the walk is not to be relied on, or None if it is.
        dropped: Those of the leaves that lie behind an operation without a backward, by id.
    """

    leaves: dict[int, torch.Tensor] = field(default_factory=dict)
    marks: list[object] = field(default_factory=list)
    blind: str | None = None
    dropped: set[int] = field(default_factory=set)


def mark(tensor: torch.Tensor, what: object) -> None:
    """Leave a mark in the graph of a tensor, for those who later walk there; it goes with the graph."""
    if tensor.grad_fn is not None:
        _metadata(tensor.grad_fn)[_MARK] = what


def walk(outputs: Iterable[torch.Tensor], *, marks: bool = False) -> Walk:
    """Walk the autograd graph from ``outputs`` down to its leaves.

    Args:
        outputs: Tensors that carry a graph; others are passed over.
        marks: Look for marks as well, which costs each node on the way a dictionary.

    Returns:
        What was met.
    """
    with no_collection():
        return _walk(list(outputs), marks=marks)


class _Meeting(torch.autograd.Function):
    """An operation on many tensors that computes nothing: its node shows where the gradients of all of them go."""

    @staticmethod
    def forward(ctx: object, *tensors: torch.Tensor) -> torch.Tensor:
        return torch.empty(0)


def runs_to_all(leaves: Sequence[torch.Tensor]) -> bool:
    """Inside a hook of a backward: the engine has planned to come to all of these leaf tensors.

    It has walked the graph itself, so this asks what a walk would find, at a tenth of the price.

    Args:
        leaves: Tensors that require gradients.

    Returns:
        False where it will not come to one of them, or does not say.
    """
    planned = torch._C._will_engine_execute_node
    try:
        with no_collection(), torch.enable_grad():
            node = _Meeting.apply(*leaves).grad_fn  # type: ignore[no-untyped-call]
            return node is not None and all(planned(accumulates) for accumulates, _ in node.next_functions)
    except RuntimeError:  # torch.autograd.grad with these very leaves; torch.func.grad, which has a graph of its own
        return False


def walk_from_here() -> Walk:
    """Inside a hook of a backward: walk on from the node that is about to run."""
    node = torch._C._current_autograd_node()
    with no_collection():
        return Walk() if node is None else _walk_from([node], marks=False)


def _walk(outputs: list[torch.Tensor], *, marks: bool) -> Walk:
    found = _walk_from([t.grad_fn for t in outputs if t.grad_fn is not None], marks=marks)
    found.leaves.update((id(t), t) for t in outputs if t.grad_fn is None and t.requires_grad)
    return found


def _walk_from(stack: list[torch.autograd.graph.Node], *, marks: bool) -> Walk:
    found = Walk()
    seen = set(stack)
    kinds: dict[type, str] = {}  # asking every node for its name would take half of the time
    drops: list[torch.autograd.graph.Node] = []
    while stack:
        node = stack.pop()
        kind = kinds.get(type(node))
        if kind is None:
            kind = kinds[type(node)] = _kind(node)
        if kind == "leaf":
            found.leaves[id(node.variable)] = node.variable  # type: ignore[attr-defined]
            continue
        if kind == "blind":
            found.blind = f"the graph holds {node.name()}, which does not show what it leads to"
        if kind == "native" and _DROPS in node.name():
            drops.append(node)
        left = _metadata(node).get(_MARK) if marks else None
        if left is not None and left not in found.marks:
            found.marks.append(left)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    found.dropped = _leaves_behind(drops)
    return found


def _leaves_behind(nodes: list[torch.autograd.graph.Node]) -> set[int]:
    stack, seen, leaves = list(nodes), set(nodes), set()
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return leaves


def _kind(node: torch.autograd.graph.Node) -> str:
    if hasattr(node, "variable"):
        return "leaf"
    if type(node).__name__ == "CppFunction":  # one Python type for many: each has to be asked for its name
        return "native"
    return "blind" if any(part in node.name() for part in _BLIND) else "plain"


def _metadata(node: torch.autograd.graph.Node) -> dict[str, object]:
    found: dict[str, object] = node.metadata  # type: ignore[assignment]  # torch 2.13 declares a method
    return found
