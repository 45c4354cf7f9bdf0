"""s for all examples by one forward and one ordinary backward, to a vector eps."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lora_probe_callbacks.estimators._backends import LossFunction, losses, precision
from lora_probe_callbacks.estimators._layers import Change, applied, plan
from lora_probe_callbacks.estimators._per_example import PerExample
from lora_probe_callbacks.estimators._untouched import only_trainable


def doubled_rank(
    model: nn.Module,
    loss_fn: LossFunction,
    mu: Mapping[int, torch.Tensor],
    example_of_row: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """s_n = d L_n / d eps_n at eps = 0 of the network at theta + eps_n * mu.

    Args:
        model: the unwrapped module.
        loss_fn: the losses L [B]; L_n must depend on the rows of example n alone.
        mu: the direction by id of the parameter.
        example_of_row: the example of every row [R], or of every token of every row [R, T].

    Returns:
        s [B] in the precision of eps, L [B], and the lowest precision in the forward.

    Raises:
        ValueError: if the number of losses is not the number of examples.
    """
    # A power of two, exact: an update of 1e-8 would vanish in the float16 of some layers.
    largest = max(float(tensor.abs().max()) for tensor in mu.values())
    unit = 2.0 ** math.frexp(largest)[1]
    changes = plan(model, {owner: tensor / unit for owner, tensor in mu.items()})
    _refuse_coupling(model)
    examples = PerExample(example_of_row, precision(model))
    # All frozen: the backward then computes no gradient of a weight, and touches no `.grad`.
    with only_trainable(model, ()), applied(changes, examples), _eager(model):
        L = losses(model, loss_fn)
        count = None if examples.eps is None else examples.eps.numel()
        if count is not None and L.numel() != count:
            raise ValueError(
                f"loss_fn returned {L.numel()} losses, but the layers got the rows of {count} examples; "
                f"expected as many. With several rows to an example (responses to a prompt), give "
                "example_of_row, e.g. torch.arange(B).repeat_interleave(G)."
            )
        if L.requires_grad:
            with torch.autocast(L.device.type, enabled=False):
                _backward(L.sum(), examples)
    _refuse_unvisited(changes, examples)
    assert examples.eps is not None
    s = examples.eps.grad
    s = torch.zeros_like(examples.eps) if s is None else s * unit
    return s.detach(), L.detach(), min(_dtypes(model) | examples.dtypes, key=lambda d: torch.finfo(d).bits)


def _backward(total: torch.Tensor, examples: PerExample) -> None:
    """Accumulate into eps, and into nothing else that the loss may depend on."""
    leaves, reentrant = _leaves(total)
    if not reentrant:
        if examples.eps is not None:
            torch.autograd.backward(total, inputs=[examples.eps])
        return
    # A reentrant checkpoint allows neither autograd.grad nor `inputs` (torch 2.13,
    # utils/checkpoint.py, CheckpointFunction.backward).
    former = [(leaf, leaf.grad) for leaf in leaves]
    try:
        torch.autograd.backward(total)
    finally:
        for leaf, gradient in former:
            if leaf is not examples.eps:
                leaf.grad = gradient


def _leaves(total: torch.Tensor) -> tuple[list[torch.Tensor], bool]:
    """Return the leaves of a graph, and whether a reentrant checkpoint is in it."""
    leaves: list[torch.Tensor] = []
    reentrant = False
    seen = {total.grad_fn}
    stack = [total.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if node.name() == "CheckpointFunctionBackward":
            reentrant = True
        elif (variable := getattr(node, "variable", None)) is not None:
            leaves.append(variable)
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return leaves, reentrant


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    """Return the floating types of parameters, and the compute types of quantised layers."""
    computed = {getattr(module, "compute_dtype", None) for module in model.modules()}
    return {p.dtype for p in model.parameters() if p.is_floating_point()} | {d for d in computed if d}


@contextlib.contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Run compiled parts as they are written, and keep DDP from preparing a reduction."""
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def _refuse_coupling(model: nn.Module) -> None:
    for path, module in model.named_modules():
        normalises = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if normalises and (module.training or module.running_mean is None):
            raise NotImplementedError(
                f"{path} ({type(module).__name__}) normalises over the batch, so an example's loss depends "
                "on the others and backend='doubled_rank' would fold them together; use model.eval(), or "
                "backend='loop'."
            )


def _refuse_unvisited(changes: list[Change], examples: PerExample) -> None:
    layers = [change for change in changes if change.layer is not None]
    missing = [change for change in layers if change.layer not in examples.visited]
    if missing or examples.eps is None:
        raise RuntimeError(
            f"{len(missing)} of {len(layers)} layers of the direction did not run with a graph in loss_fn, "
            f"{missing[0].layer} first: disabled, merged, another adapter active, another module called, or "
            "a fused kernel that reads the weights. Their part of s would be missing. Run the model that "
            "owns them with its adapter active, leave them out of the direction, or use backend='loop'."
        )
