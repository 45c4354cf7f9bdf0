"""Which module owns which tensor: names, slots, and the wrappers around a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn


class Slot(NamedTuple):
    """A parameter where it is registered: `module._parameters[attribute]`."""

    module: nn.Module
    attribute: str
    name: str
    parameter: nn.Parameter


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module itself, below torch.compile and data-parallel wrappers.

    A compiled call would not see a layer that is changed for one forward (torch 2.13), and
    DDP's forward prepares a reduction that a projection never makes.
    """
    wrappers: dict[type[nn.Module], str] = {
        nn.parallel.DistributedDataParallel: "module",
        nn.DataParallel: "module",
    }
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        wrappers[dynamo.OptimizedModule] = "_orig_mod"
    while (attribute := wrappers.get(type(model))) is not None:
        model = getattr(model, attribute)
    return model


def slots(model: nn.Module) -> Iterator[Slot]:
    """Yield every place where a parameter is registered; a tied parameter has several."""
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield Slot(module, attribute, f"{path}.{attribute}" if path else attribute, parameter)


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
