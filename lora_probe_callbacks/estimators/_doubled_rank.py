"""s for all examples by one forward and one ordinary backward, to a vector eps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from lora_probe_callbacks.estimators._backends import LossFunction, losses, precision
from lora_probe_callbacks.estimators._backward import backward
from lora_probe_callbacks.estimators._layers import Change, applied, plan
from lora_probe_callbacks.estimators._per_example import PerExample
from lora_probe_callbacks.restore.model import only_trainable
from lora_probe_callbacks.restore.tree import Tree


def doubled_rank(
    model: Tree,
    loss_fn: LossFunction,
    mu: Mapping[int, torch.Tensor],
    largest: float,
    example_of_row: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """s_n = d L_n / d eps_n at eps = 0 of the network at theta + eps_n * mu.

    Args:
        model: the unwrapped module and what is in it.
        loss_fn: the losses L [B]; L_n must depend on the rows of example n alone.
        mu: the direction by id of the parameter.
        largest: max |mu|.
        example_of_row: the example of every row [R], or of every token of every row [R, T].

    Returns:
        s [B] in the precision of eps, L [B], and the lowest precision in the forward.

    Raises:
        ValueError: if the number of losses is not the number of examples.
    """
    # A power of two, exact: an update of 1e-8 would vanish in the float16 of some layers.
    unit = 2.0 ** math.frexp(largest)[1]
    scaled = torch._foreach_div(list(mu.values()), unit)
    changes = plan(model, dict(zip(mu, scaled, strict=True)))
    refuse_coupling(model)
    rows = None if example_of_row is None else example_of_row.shape
    examples = PerExample(rows, precision(model))
    # All frozen: the backward then computes no gradient of a weight, and touches no `.grad`.
    with only_trainable(model, ()), applied(changes, examples):
        L = losses(model, loss_fn)
        if L.requires_grad:
            # None yet if all layers are inside reentrant checkpoints, which run them in the backward.
            backward(L.sum(), [] if examples.eps is None else [examples.eps])
    _refuse_unvisited(changes, examples)
    assert examples.eps is not None
    # Not before the backward: in reentrant checkpoints the layers see their rows only there.
    count = examples.eps.numel() if example_of_row is None else int(example_of_row.max()) + 1
    if L.numel() != count:
        raise ValueError(
            f"loss_fn returned {L.numel()} losses, but the layers got the rows of {count} examples; "
            "expected as many. With several rows to an example (responses to a prompt), give "
            "example_of_row, e.g. torch.arange(B).repeat_interleave(G)."
        )
    s = examples.eps.grad
    s = torch.zeros_like(examples.eps) if s is None else s.detach() * unit
    if example_of_row is not None:
        index = example_of_row.flatten().to(s.device, non_blocking=True)  # without waiting for the backward
        s = s.new_zeros(count).index_add_(0, index, s.flatten())
    return s, L.detach(), min(_dtypes(model) | examples.dtypes, key=lambda d: torch.finfo(d).bits)


def _dtypes(model: Tree) -> set[torch.dtype]:
    """Return the floating types of parameters, and the compute types of quantised layers."""
    # Not by getattr: where there is no such attribute, nn.Module takes 3 us to say so.
    computed = {vars(module).get("compute_dtype") for module in model.modules.values()}
    return {p.dtype for p in model.parameters.values() if p.is_floating_point()} | {d for d in computed if d}


def refuse_coupling(model: Tree) -> None:
    """Refuse layers that make an example's loss depend on the other examples.

    Raises:
        NotImplementedError: naming the layer.
    """
    for path, module in model.modules.items():
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
