"""Which module owns which tensor, and the wrappers around a model."""

from __future__ import annotations

import sys

import torch
from torch import nn

from lora_probe_callbacks.restore.tree import tree


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name, a tied one under its first, as `named_parameters` does."""
    return tree(model).parameters


def wrappers(model: nn.Module) -> list[nn.Module]:
    """Return a model's wrappers from the outside in, and the module itself as the last."""
    inner: dict[type[nn.Module], str] = {
        nn.parallel.DistributedDataParallel: "module",
        nn.DataParallel: "module",
    }
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        inner[dynamo.OptimizedModule] = "_orig_mod"
    chain = [model]
    while (attribute := inner.get(type(chain[-1]))) is not None:
        chain.append(getattr(chain[-1], attribute))
    return chain


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module itself, below torch.compile and data-parallel wrappers.

    A compiled call would not see a layer that is changed for one forward (torch 2.13), and
    DDP's forward prepares a reduction that a projection never makes.
    """
    return wrappers(model)[-1]


def described(model: nn.Module) -> str:
    """Return a module's class and address, to tell two of the same class apart in a message."""
    return f"{type(model).__name__} at {id(model):#x}"


def local(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Pass a tensor on if all of it is here.

    Args:
        tensor: a parameter or its gradient.
        name: of the parameter.

    Returns:
        The tensor.

    Raises:
        NotImplementedError: if it is sharded over ranks (FSDP2, tensor parallel, ZeRO-3).
    """
    if hasattr(tensor, "placements") or hasattr(tensor, "ds_id"):
        raise NotImplementedError(
            f"{name} is sharded over ranks ({type(tensor).__name__}); directions and projections need "
            "whole tensors. Gather the adapter (it is small), or keep it out of the sharding."
        )
    return tensor
