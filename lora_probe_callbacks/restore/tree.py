"""A model and all that is registered below it, looked up once."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

__all__ = ["Tree", "tree"]


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
