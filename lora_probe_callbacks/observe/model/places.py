"""What stands at many places of a model, looked up together.

Asked at every decision, of every adapter tensor. To walk there from module to module takes a microsecond or two for
each, most of it waiting for memory: little of this is in a processor's cache after a forward and a backward. So the
dictionaries are kept in which modules register their children and parameters, and ``map`` asks them. A child counts
as long as it is what its parent has by that name: what is exchanged, removed or added is seen by the next look.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from typing import NamedTuple

import torch
from torch import nn

__all__ = ["Links", "Place", "Places"]

_NOWHERE = nn.Module()  # holds nothing: the end of a way on which a module is missing


class Links:
    """Modules that are to stand where they were found.

    Args:
        links: Parent, name under it, and what stands there; None for nothing.
    """

    def __init__(self, links: Iterable[tuple[nn.Module, str, nn.Module | None]]) -> None:
        once = {(id(parent), key): (parent._modules, key, child) for parent, key, child in links}.values()
        self._registered = [registered for registered, _, _ in once]
        self._keys = [key for _, key, _ in once]
        self._children = [child for _, _, child in once]

    @property
    def hold(self) -> bool:
        """Each still does."""
        return all(map(is_, map(dict.get, self._registered, self._keys), self._children))


class Place(NamedTuple):
    """Where a parameter is registered: the module at which the way begins, the modules on it, and its name."""

    start: nn.Module
    way: Sequence[str]
    name: str

    @property
    def tensor(self) -> torch.Tensor | None:
        """What is registered there now; None where nothing is."""
        module = self.start
        for key in self.way:
            child = module._modules.get(key)
            if child is None:
                return None
            module = child
        return module._parameters.get(self.name)


class Places:
    """Many places.

    Args:
        places: In the order in which their tensors are wanted.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        self._places = list(places)
        self._names = [place.name for place in self._places]
        self._follow()

    def _follow(self) -> None:
        links: list[tuple[nn.Module, str, nn.Module | None]] = []
        self._registered: list[dict[str, nn.Parameter | None]] = []
        for start, way, _ in self._places:
            module = start
            for key in way:
                child = module._modules.get(key)
                links.append((module, key, child))
                module = _NOWHERE if child is None else child
            self._registered.append(module._parameters)
        self._links = Links(links)

    def tensors(self) -> list[torch.Tensor | None]:
        """What is registered now at each place; None where nothing is."""
        if not self._links.hold:
            self._follow()
        return list(map(dict.get, self._registered, self._names))
