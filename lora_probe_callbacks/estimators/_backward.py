"""A backward into chosen tensors, also through reentrant checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def backward(total: torch.Tensor, inputs: Sequence[torch.Tensor], *, retain_graph: bool = False) -> None:
    """Accumulate into the `.grad` of the inputs, and into nothing else that `total` depends on.

    Args:
        total: a scalar with a graph.
        inputs: leaves; those that only a reentrant checkpoint uses get their gradient all the same.
        retain_graph: whether there will be another backward.
    """
    leaves, reentrant = _leaves(total)
    # The gradients of a bfloat16 forward have its types already; a float32 part must stay so.
    with torch.autocast(total.device.type, enabled=False):
        if not reentrant:
            if inputs:
                torch.autograd.backward(total, inputs=list(inputs), retain_graph=retain_graph)
            return
        # A reentrant checkpoint allows neither autograd.grad nor `inputs` (torch 2.13,
        # utils/checkpoint.py, CheckpointFunction.backward).
        wanted = {id(leaf) for leaf in inputs}
        former = [(leaf, leaf.grad) for leaf in leaves if id(leaf) not in wanted]
        try:
            torch.autograd.backward(total, retain_graph=retain_graph)
        finally:
            for leaf, gradient in former:
                leaf.grad = gradient


def _leaves(total: torch.Tensor) -> tuple[list[torch.Tensor], bool]:
    """Return the leaves of a graph, and whether a reentrant checkpoint is in it."""
    leaves: list[torch.Tensor] = []
    reentrant = False
    seen = {total.grad_fn}
    stack = [total.grad_fn]
    while stack:
        node: Any = stack.pop()
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            leaves.append(node.variable)
        elif kind == "CheckpointFunctionBackward":
            reentrant = True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return leaves, reentrant
