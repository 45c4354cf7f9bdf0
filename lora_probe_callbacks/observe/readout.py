"""One transfer to the host for everything that a decision needs from the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["Readout", "local", "norms"]


class Readout:
    """Collects small device tensors and fetches them together, once.

    A value that was added is addressed by its ticket, which is valid after :meth:`fetch`.
    """

    def __init__(self) -> None:
        self._vectors: list[tuple[range, torch.Tensor]] = []
        self._scalars: list[torch.Tensor] = []
        self._places: list[int] = []  # of the scalars
        self._length = 0
        self._values: list[float] = []

    def add(self, values: torch.Tensor) -> range:
        """Add a one-dimensional tensor; returns where its values will be found."""
        ticket = self._ticket(values.numel())
        self._vectors.append((ticket, values.detach()))
        return ticket

    def add_all(self, scalars: Sequence[torch.Tensor]) -> range:
        """Add tensors without dimensions, wherever they are."""
        ticket = self._ticket(len(scalars))
        self._scalars += scalars
        self._places += ticket
        return ticket

    def _ticket(self, size: int) -> range:
        start, self._length = self._length, self._length + size
        return range(start, self._length)

    def fetch(self) -> None:
        """Copy everything that was added to the host. One transfer for each device."""
        kinds: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[torch.Tensor]]] = {}
        for place, scalar in zip(self._places, self._scalars, strict=True):
            kind = (scalar.device, scalar.dtype)
            if kind not in kinds:
                kinds[kind] = ([], [])
            kinds[kind][0].append(place)
            kinds[kind][1].append(scalar)
        vectors: list[tuple[Sequence[int], torch.Tensor]] = [(at, torch.stack(s)) for at, s in kinds.values()]
        by_device: dict[torch.device, list[tuple[Sequence[int], torch.Tensor]]] = {}
        for places, vector in (*vectors, *self._vectors):
            by_device.setdefault(vector.device, []).append((places, vector))
        self._values = [0.0] * self._length
        for device, parts in by_device.items():
            flat = torch.cat([vector.to(_wide(device)) for _, vector in parts]).tolist()
            for place, value in zip((p for places, _ in parts for p in places), flat, strict=True):
                self._values[place] = value

    def get(self, ticket: range) -> list[float]:
        """The values behind ``ticket``."""
        return self._values[ticket.start : ticket.stop]


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds (all of it, unless it is a DTensor). For use under ``no_grad``."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def norms(tensors: Sequence[torch.Tensor], order: float) -> Sequence[torch.Tensor]:
    """Norms of many tensors in few kernels.

    In float64 (but on MPS, which has none): there the square of every float32 is a number of its own, so that
    a norm is 0 where every element is, and finite where every element is.

    Args:
        tensors: Floating tensors of any shapes.
        order: 1 or 2.

    Returns:
        One scalar each, on the device of its tensor.
    """
    if not tensors:
        return ()
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    if len(kinds) == 1:
        return torch._foreach_norm(list(tensors), order, dtype=_wide(tensors[0].device))
    result: dict[int, torch.Tensor] = {}
    for (device, _), indices in kinds.items():
        values = torch._foreach_norm([tensors[i] for i in indices], order, dtype=_wide(device))
        result.update(zip(indices, values, strict=True))
    return [result[i] for i in range(len(tensors))]
