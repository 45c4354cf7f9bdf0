"""One transfer to the host for everything that a decision needs from the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch

from lora_probe_callbacks.facts import Floats

__all__ = ["PLAIN", "Grouping", "Kind", "Readout", "batches", "group", "kind", "local"]

_CHUNK = 2**21  # elements: 8 MiB of float32, and as many in float64 for the moment of a norm
Kind = tuple[torch.device, torch.dtype, torch.Size]
PLAIN = (torch.Tensor, torch.nn.Parameter)
# What the tensors of a group have in common; asked of every tensor twice a step.
kind: Callable[[torch.Tensor], Kind] = attrgetter("device", "dtype", "shape")


class Readout:
    """Collects small device tensors and brings them to the host together, once.

    A value that was added is addressed by its ticket, which is valid after :meth:`send` and :meth:`receive`.
    """

    def __init__(self) -> None:
        self._vectors: list[tuple[Sequence[int], torch.Tensor]] = []  # places, values
        self._length = 0
        self._sent: list[tuple[list[Sequence[int]], torch.Tensor]] = []
        self._values: Floats = np.empty(0)

    def add(self, values: torch.Tensor) -> range:
        """Add a one-dimensional tensor; returns where its values will be found."""
        ticket = self._ticket(values.numel())
        self._vectors.append((ticket, values.detach()))
        return ticket

    def add_norms(self, tensors: Sequence[torch.Tensor], order: float) -> range:
        """Add the norms of many tensors, in few kernels; see :meth:`add_row_norms`.

        Args:
            tensors: Floating tensors of any shapes.
            order: 1 or 2.

        Returns:
            Where the norms will be found, in the order of the tensors.
        """
        grouping = group(tensors)
        ticket = self._ticket(len(tensors))
        places = [ticket.start + i for i in grouping.order]
        self._add_rows(places, batches([tensors[i] for i in grouping.order], grouping), order, None)
        return ticket

    def add_row_norms(self, rows: Sequence[torch.Tensor], order: float, scale: torch.Tensor | None = None) -> range:
        """Add the norms of what has been put together already, see :func:`batches`.

        In float64 (but on MPS, which has none): there the square of every float32 is a number of its own, so that
        a norm is 0 exactly where every element is, and finite exactly where every element is.

        Args:
            rows: Floating tensors, each entry of whose first dimension counts by itself.
            order: 1 or 2.
            scale: What to divide the norms by.

        Returns:
            Where the norms will be found, in the order of the rows.
        """
        ticket = self._ticket(sum(part.shape[0] for part in rows))
        self._add_rows(ticket, rows, order, scale)
        return ticket

    def add_row_counts(self, rows: Sequence[torch.Tensor]) -> range:
        """Add how many elements of each row are not zero; a nan is not.

        Args:
            rows: Tensors as for :meth:`add_row_norms`; they are overwritten.

        Returns:
            Where the counts will be found, in the order of the rows.
        """
        ticket = self._ticket(sum(part.shape[0] for part in rows))
        start = ticket.start
        for part in rows:
            stop = start + part.shape[0]
            exact = part[0].numel() < 2**24  # in float32, which CPUs add up in half of the time
            counts = part.ne_(0).sum(tuple(range(1, part.dim())), dtype=torch.float32 if exact else _wide(part))
            self._vectors.append((range(start, stop), counts))
            start = stop
        return ticket

    def add_row_elements(self, rows: Sequence[torch.Tensor], few: int) -> list[tuple[torch.Size, range]]:
        """Add a few elements of each row, as they are now.

        Args:
            rows: Tensors as for :meth:`add_row_norms`.
            few: Elements of a row, evenly spread; all of one that has fewer.

        Returns:
            For each tensor rows and elements of a row, and where these will be found.
        """
        found = []
        for part in rows:
            flat = part.flatten(1)
            stride = max(1, flat.shape[1] // few)
            some = flat[:, : few * stride : stride].to(_wide(part), copy=True)
            found.append((some.shape, self.add(some.reshape(-1))))
        return found

    def _add_rows(
        self, places: Sequence[int], rows: Sequence[torch.Tensor], order: float, scale: torch.Tensor | None
    ) -> None:
        large: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[torch.Tensor]]] = {}
        found, start = [], 0
        for part in rows:
            stop = start + part.shape[0]
            mine, start = places[start:stop], stop
            if len(mine) > 1:
                inner = tuple(range(1, part.dim()))
                found.append((mine, torch.linalg.vector_norm(part, order, dim=inner, dtype=_wide(part))))
            else:
                known = large.setdefault((part.device, part.dtype), ([], []))
                known[0].extend(mine)
                known[1].append(part)
        for mine, tensors in large.values():  # without a copy of them in float64
            found.append((mine, torch.stack(torch._foreach_norm(tensors, order, dtype=_wide(tensors[0])))))
        self._vectors += found if scale is None else [(mine, v / scale.to(v.device)) for mine, v in found]

    def _ticket(self, size: int) -> range:
        start, self._length = self._length, self._length + size
        return range(start, self._length)

    def send(self) -> None:
        """Gather what was added, on its devices. Nothing waits for them here, nothing can be added any more."""
        parts: dict[torch.device, list[tuple[Sequence[int], torch.Tensor]]] = {}
        for places, vector in self._vectors:
            wide = _wide(vector)
            vector = vector if vector.dtype is wide else vector.to(wide)
            parts.setdefault(vector.device, []).append((places, vector))
        self._sent = [([places for places, _ in some], torch.cat([v for _, v in some])) for some in parts.values()]

    def receive(self) -> None:
        """Copy what was sent to the host: one transfer for each device, which waits until the device has come to it."""
        self._values = np.zeros(self._length)
        for places, flat in self._sent:
            values, start = np.array(flat.tolist()), 0  # numpy() is refused inside functional transforms
            for mine in places:
                part, start = values[start : start + len(mine)], start + len(mine)
                if isinstance(mine, range):  # most are
                    self._values[mine.start : mine.stop] = part
                else:
                    self._values[list(mine)] = part

    def get(self, ticket: range) -> Floats:
        """The values behind ``ticket``."""
        return self._values[ticket.start : ticket.stop]


class Grouping(NamedTuple):
    """Which tensors to copy into one, for one kernel in place of many: small ones of one shape.

    Attributes:
        order: Indices of the tensors, so that those of a group stand side by side.
        kinds: The kinds of the tensors in that order.
        groups: The parts of that order; a large tensor is a group of its own.
    """

    order: Sequence[int]
    kinds: Sequence[Kind]
    groups: Sequence[slice]


def group(tensors: Sequence[torch.Tensor]) -> Grouping:
    """Group tensors; for those of the kinds of an earlier call the very object of that call.

    Args:
        tensors: Tensors of any kinds.

    Returns:
        Their groups.
    """
    return _group(tuple(map(kind, tensors)))


@lru_cache(maxsize=8)  # asked several times a step for tensors of the same kinds
def _group(kinds: tuple[Kind, ...]) -> Grouping:
    alike: dict[Kind, list[int]] = {}
    for index, one in enumerate(kinds):
        alike.setdefault(one, []).append(index)
    together: list[list[int]] = []
    for (_, _, shape), indices in alike.items():
        size = max(1, _CHUNK // max(1, shape.numel()))
        together += [indices[i : i + size] for i in range(0, len(indices), size)]
    order = list(itertools.chain.from_iterable(together))
    bounds = itertools.pairwise(itertools.accumulate(map(len, together), initial=0))
    return Grouping(order, [kinds[i] for i in order], [slice(*pair) for pair in bounds])


def batches(tensors: list[torch.Tensor], grouping: Grouping) -> list[torch.Tensor]:
    """Put tensors together, each of them a row.

    Args:
        tensors: Tensors of the kinds that were grouped, in the order of the grouping.
        grouping: Their groups.

    Returns:
        One tensor a group: a copy of several, [n, ...], or a view of one, [1, ...].
    """
    return [_together(tensors[part]) for part in grouping.groups]


def _together(tensors: list[torch.Tensor]) -> torch.Tensor:
    rows = torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)
    return rows if rows.dim() > 1 else rows.unsqueeze(1)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds (all of it, unless it is a DTensor). For use under ``no_grad``."""
    if type(tensor) in PLAIN:  # asked of every tensor again and again
        return tensor
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_mps else torch.float64
