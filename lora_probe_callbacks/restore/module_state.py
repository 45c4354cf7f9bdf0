"""What a forward may leave behind in the modules that it runs, kept and put back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from types import FunctionType, ModuleType, NoneType
from typing import Any

import torch
from torch import nn

from lora_probe_callbacks.restore.random import RandomState

__all__ = ["ActiveAdapters", "Buffers", "ModuleState", "module_state_restored", "random_state"]


class ModuleState:
    """All state that a forward may leave: random numbers, buffers, and what modules keep in their attributes.

    The last are a router's auxiliary loss, a counter, a list of features, or an object with such things.

    Args:
        module: What may be run.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        holders = [m.__dict__ for m in modules]
        unusual = [value for held in holders for value in _unusual(held)]
        self._random = RandomState({v for v in unusual if isinstance(v, torch.Generator)})
        self._buffers = Buffers(modules)
        kept = {id(v): v.__dict__ for v in unusual if _is_an_object(v)}
        self._attributes = [_Attributes(held) for held in (*holders, *kept.values())]

    def put_back(self) -> None:
        """Make it what it was."""
        self._random.put_back()
        for attributes in self._attributes:
            attributes.put_back()
        self._buffers.put_back()


@contextmanager
def module_state_restored(module: nn.Module) -> Iterator[None]:
    """Put all state that a forward of this module may leave back on exit, see :class:`ModuleState`."""
    state = ModuleState(module)
    try:
        yield
    finally:
        state.put_back()


def random_state(module: nn.Module) -> RandomState:
    """The random state of this moment, that of the generators included which modules keep in their attributes."""
    return RandomState({v for m in module.modules() for v in _unusual(m.__dict__) if isinstance(v, torch.Generator)})


class Buffers:
    """The buffers of some modules: which they are, and their contents.

    Args:
        modules: Their owners, each with its own alone.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [
            (module._buffers, name, buffer, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_inference()
        ]

    def put_back(self) -> None:
        """Make them what they were; contents are written only where they changed."""
        for registry, name, buffer, contents in self._kept:
            registry[name] = buffer
            # Batch norm writes its statistics without counting it as a change, and saves them for the backward,
            # which a write that counts would break.
            if not torch.equal(buffer, contents):
                buffer.data.copy_(contents)


# What PEFT writes when it switches adapters, besides requires_grad (peft 0.21).
_SWITCHES = ("_active_adapter", "_disable_adapters", "active_adapter")


class ActiveAdapters:
    """Which adapters of some modules PEFT has active and enabled.

    Args:
        modules: Those that are looked at; what is no part of PEFT has nothing to keep.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        a, b, c = _SWITCHES  # written out: most of many thousand modules have none of them
        holders = [held for held in map(vars, modules) if a in held or b in held or c in held]
        self._kept = [(held, {key: held[key] for key in _SWITCHES if key in held}) for held in holders]
        self._contained = [pair for _, former in self._kept for pair in _contained(former)]

    def put_back(self) -> None:
        """Make them active again; what had its class's default has it again."""
        for held, former in self._kept:
            for key in _SWITCHES:
                if key in held and key not in former:
                    del held[key]
            held.update(former)
        for value, contents in self._contained:
            _refill(value, contents)


class _Attributes:
    """The attributes of one object, and the contents of the containers among them. There are many thousands."""

    __slots__ = ("_contained", "_former", "_present")

    def __init__(self, present: dict[str, Any]) -> None:
        self._present = present
        self._former = dict(present)
        self._contained = _contained(present)

    def put_back(self) -> None:
        present, former = self._present, self._former
        if len(present) != len(former) or not all(map(is_, present.values(), former.values())):
            present.clear()
            present.update(former)
        for value, contents in self._contained:
            _refill(value, contents)


# What torch keeps in every module and a forward does not touch; parameters and buffers may be exchanged.
_TORCHS = frozenset(nn.Module().__dict__) - {"training", "_parameters", "_buffers"}
_USUAL = (bool, int, float, str, bytes, NoneType, tuple, list, dict, set, OrderedDict, type, FunctionType, nn.Parameter)


def _unusual(attributes: dict[str, Any]) -> list[Any]:
    """Values of other types than most: told by their very type, since asking torch's classes is slow."""
    return [value for value in attributes.values() if type(value) not in _USUAL]


def _is_an_object(value: object) -> bool:
    """An instance of somebody's class, such as a buffer of samples with a place in it."""
    kinds = type | ModuleType | FunctionType | torch.Tensor | nn.Module
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, kinds)


def _contained(attributes: dict[str, Any]) -> list[tuple[Any, list[Any]]]:
    """The containers among some attributes, and what is in them."""
    return [
        (value, contents)
        for key, value in attributes.items()
        if key not in _TORCHS and (contents := _contents(value)) is not None
    ]


def _contents(value: object) -> list[Any] | None:
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        return [*value, *value.values()]  # type: ignore[attr-defined, misc]
    return list(value) if kind is list or kind is set else None  # type: ignore[call-overload]


def _refill(value: Any, contents: list[Any]) -> None:
    """Compares by identity: comparing tensors by value would not give one answer."""
    if not contents and not value:
        return
    now = _contents(value)
    if now is None or (len(now) == len(contents) and all(map(is_, now, contents))):
        return
    value.clear()
    if isinstance(value, dict):
        half = len(contents) // 2
        value.update(zip(contents[:half], contents[half:], strict=True))
    else:
        (value.extend if isinstance(value, list) else value.update)(contents)
