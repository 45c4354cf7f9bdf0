"""Which leaf tensors the graph of an output leads to."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["in_backward", "reachable_leaves"]

# Nodes that hide a graph (reentrant checkpointing re-runs its part inside the backward) or that
# pretend to one (a compiled region is one node that leads to every parameter it was given).
_BLIND = ("CheckpointFunction", "CompiledFunction", "CompiledBlock")


def in_backward() -> bool:
    """Tell whether this thread is inside an autograd backward, as a recomputed forward is."""
    return torch._C._current_graph_task_id() != -1


def reachable_leaves(outputs: Iterable[torch.Tensor]) -> tuple[set[int], str | None]:
    """Walk the autograd graph from ``outputs`` down to its leaves.

    Args:
        outputs: Tensors that carry a graph; others are passed over.

    Returns:
        The ids of the leaf tensors reached, and the reason why the walk is not to be relied on,
        or None if it is.
    """
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    leaves = {id(t) for t in outputs if t.grad_fn is None and t.requires_grad}
    seen = set(stack)
    blind = None
    kinds: dict[type, str] = {}  # asking every node for its name would take half of the time
    while stack:
        node = stack.pop()
        kind = kinds.get(type(node))
        if kind is None:
            kind = kinds[type(node)] = _kind(node)
        if kind == "leaf":
            leaves.add(id(node.variable))  # type: ignore[attr-defined]
            continue
        if kind == "blind":
            blind = f"the graph holds {node.name()}, which does not show what it leads to"
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return leaves, blind


def _kind(node: torch.autograd.graph.Node) -> str:
    if hasattr(node, "variable"):
        return "leaf"
    return "blind" if any(part in node.name() for part in _BLIND) else "plain"
