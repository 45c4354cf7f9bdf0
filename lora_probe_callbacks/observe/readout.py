"""One transfer to the host for everything that a decision needs from the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["Readout", "local"]

_STACKED = 2**20  # elements of small tensors of one shape that are copied into one, for one kernel in place of many
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Readout:
    """Collects small device tensors and fetches them together, once.

    A value that was added is addressed by its ticket, which is valid after :meth:`fetch`.
    """

    def __init__(self) -> None:
        self._vectors: list[tuple[Sequence[int], torch.Tensor]] = []  # places, values
        # The same of scalars, to be stacked when they are fetched.
        self._scalars: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[torch.Tensor]]] = {}
        self._length = 0
        self._values: list[float] = []

    def add(self, values: torch.Tensor) -> range:
        """Add a one-dimensional tensor; returns where its values will be found."""
        ticket = self._ticket(values.numel())
        self._vectors.append((ticket, values.detach()))
        return ticket

    def add_norms(self, tensors: Sequence[torch.Tensor], order: float, scale: torch.Tensor | None = None) -> range:
        """Add the norms of many tensors, in few kernels.

        In float64 (but on MPS, which has none): there the square of every float32 is a number of its own, so that
        a norm is 0 exactly where every element is, and finite exactly where every element is.

        Args:
            tensors: Floating tensors of any shapes.
            order: 1 or 2.
            scale: What to divide the norms by.

        Returns:
            Where the norms will be found, in the order of the tensors.
        """
        ticket = self._ticket(len(tensors))
        shapes: dict[tuple[torch.device, torch.dtype, torch.Size], list[int]] = {}
        for index, tensor in enumerate(tensors):
            shapes.setdefault((tensor.device, tensor.dtype, tensor.shape), []).append(index)
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for (device, dtype, shape), indices in shapes.items():
            if 1 < len(indices) <= _STACKED // max(1, shape.numel()):
                rows = torch.stack([tensors[i] for i in indices]).flatten(1)
                norms = torch.linalg.vector_norm(rows, order, dim=1, dtype=_wide(device))
                self._vectors.append(
                    ([ticket[i] for i in indices], norms if scale is None else norms / scale.to(device))
                )
            else:
                kinds.setdefault((device, dtype), []).extend(indices)
        for (device, _), indices in kinds.items():
            wide = _wide(device)
            values = torch._foreach_norm([tensors[i] for i in indices], order, dtype=wide)
            places, scalars = self._scalars.setdefault((device, wide), ([], []))
            places += [ticket[i] for i in indices]
            scalars += values if scale is None else [v / scale.to(device) for v in values]
        return ticket

    def _ticket(self, size: int) -> range:
        start, self._length = self._length, self._length + size
        return range(start, self._length)

    def fetch(self) -> None:
        """Copy everything that was added to the host. One transfer for each device."""
        by_device: dict[torch.device, list[tuple[Sequence[int], torch.Tensor]]] = {}
        stacked = [(places, torch.stack(scalars)) for places, scalars in self._scalars.values()]
        for places, vector in (*stacked, *self._vectors):
            by_device.setdefault(vector.device, []).append((places, vector.to(_wide(vector.device))))
        self._values = [0.0] * self._length
        for parts in by_device.values():
            flat = torch.cat([vector for _, vector in parts]).tolist()
            for place, value in zip((p for places, _ in parts for p in places), flat, strict=True):
                self._values[place] = value

    def get(self, ticket: range) -> list[float]:
        """The values behind ``ticket``."""
        return self._values[ticket.start : ticket.stop]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds (all of it, unless it is a DTensor). For use under ``no_grad``."""
    if type(tensor) in _PLAIN:  # asked of every tensor again and again
        return tensor
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
