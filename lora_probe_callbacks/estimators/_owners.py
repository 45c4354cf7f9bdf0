"""Which module owns which tensor: names, slots, and the wrappers around a model."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import nn


class Tree(NamedTuple):
    """A module and all that is registered below it, looked up once.

    `nn.Module.named_modules` recurses by generators; on a deep model one walk takes 10 ms, in
    which the device has nothing to do, and a projection looks at all modules a dozen times.

    Attributes:
        root: the module.
        modules: every module once, by its first path.
        names: every parameter by each of its names; a tied one has several.
        parameters: every parameter once, by its first name.
    """

    root: nn.Module
    modules: dict[str, nn.Module]
    names: dict[str, nn.Parameter]
    parameters: dict[str, nn.Parameter]


def tree(model: nn.Module) -> Tree:
    """Return a module and all that is registered below it."""
    modules: dict[str, nn.Module] = {}
    names: dict[str, nn.Parameter] = {}
    parameters: dict[str, nn.Parameter] = {}
    seen: set[nn.Module] = set()
    named: set[int] = set()

    def visit(path: str, module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        modules[path] = module
        registered, children = module._parameters, module._modules
        if not registered and not children:
            return
        prefix = f"{path}." if path else ""
        for attribute, parameter in registered.items():
            if parameter is not None:
                name = prefix + attribute
                names[name] = parameter
                if id(parameter) not in named:
                    named.add(id(parameter))
                    parameters[name] = parameter
        for name, child in children.items():
            if child is not None:
                visit(prefix + name, child)

    visit("", model)
    return Tree(model, modules, names, parameters)


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
