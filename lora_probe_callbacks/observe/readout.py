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
        self._parts: list[torch.Tensor] = []
        self._length = 0
        self._values: list[float] = []

    def add(self, values: torch.Tensor) -> range:
        """Add a one-dimensional tensor; returns where its values will be found."""
        ticket = range(self._length, self._length + values.numel())
        self._parts.append(values.detach())
        self._length += values.numel()
        return ticket

    def add_all(self, scalars: Sequence[torch.Tensor]) -> range:
        """Add tensors of one element each, wherever they are."""
        start = self._length
        for scalar in scalars:
            self.add(scalar.reshape(1))
        return range(start, self._length)

    def fetch(self) -> None:
        """Copy everything that was added to the host. One transfer for each device."""
        by_device: dict[torch.device, list[int]] = {}
        for index, part in enumerate(self._parts):
            by_device.setdefault(part.device, []).append(index)
        fetched: dict[int, list[float]] = {}
        for device, indices in by_device.items():
            dtype = torch.float32 if device.type == "mps" else torch.float64
            parts = [self._parts[i].to(dtype) for i in indices]
            flat = torch.cat(parts).tolist()
            start = 0
            for i in indices:
                size = self._parts[i].numel()
                fetched[i] = flat[start : start + size]
                start += size
        self._values = [value for i in range(len(self._parts)) for value in fetched[i]]

    def get(self, ticket: range) -> list[float]:
        """The values behind ``ticket``."""
        return self._values[ticket.start : ticket.stop]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds (all of it, unless it is a DTensor)."""
    to_local = getattr(tensor, "to_local", None)
    return tensor.detach() if to_local is None else to_local().detach()


def norms(tensors: Sequence[torch.Tensor], order: float) -> torch.Tensor:
    """Norms of many tensors in few kernels.

    Args:
        tensors: Floating tensors of any shapes on one device.
        order: 1, 2 or ``inf``.

    Returns:
        [len(tensors)], float32 (float64 for float64 tensors).
    """
    if not tensors:
        return torch.empty(0)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_dtype.setdefault(tensor.dtype, []).append(index)
    result: list[torch.Tensor | None] = [None] * len(tensors)
    for dtype, indices in by_dtype.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = torch._foreach_norm([tensors[i] for i in indices], order, dtype=wide)
        for i, value in zip(indices, values, strict=True):
            result[i] = value
    return torch.stack([v.to(torch.float64 if len(by_dtype) > 1 else v.dtype) for v in result if v is not None])
