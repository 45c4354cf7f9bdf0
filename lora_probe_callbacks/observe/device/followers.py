"""Adapters that must follow the trained one: do they, and how much of them does?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lora_probe_callbacks.facts import Floats, Ints
from lora_probe_callbacks.observe.device.transfer import Readout, local

__all__ = ["Followers", "Pair"]

_FEW = 16  # elements of a tensor
# How far the trained element must be away, relative to the copy, so that a copy that follows has to move: eight last
# digits of 16 bits (it stalls there from a decay of 0.94 on); in float32 a copy with a decay of 0.9999 moves there.
_FAR = {torch.bfloat16: 8 * 2.0**-7, torch.float16: 8 * 2.0**-10}
_FAR_ELSE = 1e-2
_LOST = 0.8  # of the elements of a tensor that should have moved
_LOOKS, _LOOKS_ELSE = 3, 8  # in 16 bits nothing else explains it; else the tensors may take turns


class Pair(NamedTuple):
    """A tensor of a copy, and the trained one of the same place; None if there is none."""

    name: str
    copy: torch.Tensor
    trained: torch.Tensor | None


@dataclass(eq=False, slots=True)
class _Seen:
    """What was seen of one adapter at the last look, and how often."""

    bits: float
    version: int
    copy: NDArray[np.float64]  # [tensors, _FEW]
    trained: NDArray[np.float64]
    counts: dict[str, int]
    resting: Ints  # [tensors, _FEW]: looks in a row at which it should have moved and had not
    away: Ints  # [tensors]: looks in a row at which it had moved, and away from the trained one
    parts: dict[str, Any] = field(default_factory=dict)


class Followers:
    """For how many steps has each been bit-equal, which of its tensors stand still, and which go elsewhere?

    Norms do not tell: the step of a slow average changes last digits alone. The bits are added up as integers, and a
    few elements are compared with the trained ones.

    Args:
        adapters: Name to its tensors.
    """

    def __init__(self, adapters: Mapping[str, Sequence[Pair]]) -> None:
        self._adapters = {n: [p for p in pairs if p.copy.is_floating_point()] for n, pairs in adapters.items()}
        self._seen: dict[str, _Seen] = {}

    def read(self, readout: Readout) -> range | None:
        """Put a sum of the bits of each adapter, and a few elements of it, into ``readout``."""
        if not self._adapters:
            return None
        tickets = []
        for pairs in self._adapters.values():
            tickets.append(readout.add(_sum_of_bits([p.copy for p in pairs]).reshape(1)))
            tickets += [readout.add(_few(t)) for p in pairs for t in (p.copy, p.trained)]
        return range(tickets[0].start, tickets[-1].stop)

    def advance(self, values: Floats, step: int, *, moved: bool) -> None:
        """Count one more look.

        Args:
            values: What was read.
            step: The step in which it was read.
            moved: The trained adapter has moved since the last look.
        """
        for name, pairs in self._adapters.items():
            size = 1 + 2 * len(pairs) * _FEW
            mine, values = values[:size], values[size:]
            copy, trained = mine[1:].reshape(len(pairs), 2, _FEW).transpose(1, 0, 2)
            version = sum(p.copy._version for p in pairs)
            self._seen[name] = self._look(self._seen.get(name), pairs, mine[0], version, copy, trained, step, moved)

    def _look(
        self,
        before: _Seen | None,
        pairs: Sequence[Pair],
        bits: float,
        version: int,
        copy: NDArray[np.float64],
        trained: NDArray[np.float64],
        step: int,
        moved: bool,
    ) -> _Seen:
        still = before is not None and before.bits == bits
        counts = (
            dict(before.counts) if before is not None and still else {"still": 0, "still_since": step, "written": 0}
        )
        if before is None:
            none = np.zeros(len(pairs), np.int64)
            return _Seen(bits, version, copy, trained, counts, np.zeros(copy.shape, np.int64), none)
        if still and moved:
            counts["still"] += 1
            counts["written"] += version > before.version
        written = version > before.version or not still
        went = copy != before.copy
        far = np.abs(before.trained - before.copy) > _far(pairs)[:, None] * np.abs(before.copy)
        should = far & written & moved
        resting = np.where(went, 0, before.resting + should)
        was, now = (np.linalg.norm(trained - c, axis=1) for c in (before.copy, copy))
        away = np.where(went.any(1) & moved, np.where(now > was, before.away + 1, 0), before.away)
        seen = _Seen(bits, version, copy, trained, counts, resting, away)
        looks = np.array([_LOOKS if p.copy.dtype in _FAR else _LOOKS_ELSE for p in pairs])
        seen.parts = _parts(pairs, far, resting >= looks[:, None], away > _LOOKS)
        return seen

    def counts(self, name: str) -> dict[str, Any]:
        """Fields of the fact about one adapter."""
        seen = self._seen.get(name)
        return {} if seen is None else {**seen.counts, **seen.parts}


def _parts(
    pairs: Sequence[Pair], far: NDArray[np.bool_], lost: NDArray[np.bool_], away: NDArray[np.bool_]
) -> dict[str, Any]:
    there = np.array([p.trained is not None for p in pairs], np.bool_)
    number = (far | lost).sum(1)
    behind = there & (number >= _FEW // 4) & (lost.sum(1) >= _LOST * number)
    return {
        "behind": tuple(p.name for p, b in zip(pairs, behind, strict=True) if b),
        "lost": float(lost[there].sum() / max(1, (far | lost)[there].sum())),
        "astray": tuple(p.name for p, a in zip(pairs, there & away & ~behind, strict=True) if a),
    }


def _far(pairs: Sequence[Pair]) -> Floats:
    return np.array([_FAR.get(p.copy.dtype, _FAR_ELSE) for p in pairs])


def _few(tensor: torch.Tensor | None) -> torch.Tensor:
    values = torch.zeros(_FEW) if tensor is None else local(tensor).reshape(-1)
    some = values[:: max(1, values.numel() // _FEW)][:_FEW]
    return torch.nn.functional.pad(some.detach().float(), (0, _FEW - some.numel()))


def _sum_of_bits(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        values = local(tensor)
        bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
        total = total.to(bits.device) + bits.sum(dtype=torch.int64)
    return total % 2**24  # float32 holds it exactly
