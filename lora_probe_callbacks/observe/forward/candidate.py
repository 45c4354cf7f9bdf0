"""One outermost call with gradients enabled, and the tensors in what it returns."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_probe_callbacks.facts import Calls, ForwardFact, Ints, Mode
from lora_probe_callbacks.observe.forward.graph import Walk

__all__ = ["Candidate", "tensors_in"]


@dataclass(eq=False, slots=True)
class Candidate:
    """One outermost call with gradients enabled, as it is being observed."""

    module: str
    modes: tuple[Mode, ...]
    active: tuple[str, ...]
    observed: bool  # the calls of layers are
    with_grad: set[int]  # units whose layer ran with gradients enabled
    holds_expected: bool
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)  # adapter to rows with it, and all rows
    without_token: int = 0
    in_eval: set[int] = field(default_factory=set)
    unchecked: int = 0
    cut: set[int] = field(default_factory=set)  # units inside a reentrant checkpoint without a backward
    received: bool = False
    carries_graph: bool = True  # some output requires gradients
    modes_at_backward: tuple[Mode, ...] | None = None
    active_at_backward: tuple[str, ...] | None = None
    leaves: set[int] | None = None
    active_calls: dict[int, int] = field(
        default_factory=dict
    )  # unit to how often its layer ran with its adapter active
    total_calls: dict[int, int] = field(default_factory=dict)  # in any state
    odd: dict[int, Mode] = field(default_factory=dict)  # see Calls
    dropped: set[int] = field(default_factory=set)  # leaves behind an operation without a backward
    why_unknown: str | None = None
    cotangent: torch.Tensor | None = None  # of an output of one element: the loss, as a rule
    called: set[int] = field(default_factory=set)  # ids of the modules that ran inside
    to_walk: bool = False  # when a gradient arrives, and only where the engine will not come to all slots by itself
    inputs: Sequence[weakref.ref[torch.Tensor]] = ()  # the tensors that it was given
    inside: dict[int, int] = field(default_factory=dict)  # tensor id to slot, as a sharded model shows them inside

    def reaches(self, found: Walk) -> None:
        """Enter what its graph leads to."""
        self.leaves, self.dropped = set(found.leaves), found.dropped
        self.why_unknown = self.why_unknown or found.blind

    def _calls(self, units: int) -> Calls:
        return Calls(_column(self.active_calls, units), _column(self.total_calls, units), dict(self.odd))

    def fact(self, slot_of: Mapping[int, int]) -> ForwardFact:
        """What the checks may know of it; ``slot_of`` maps a tensor's id to its slot."""
        reached = None
        slots = {**slot_of, **self.inside} if self.inside else slot_of
        if self.leaves is not None and self.why_unknown is None:
            reached = frozenset(map(slots.__getitem__, self.leaves & slots.keys()))
        return ForwardFact(
            module=self.module,
            received=self.received,
            modes=self.modes,
            active=self.active,
            modes_at_backward=self.modes_at_backward,
            active_at_backward=self.active_at_backward,
            calls=self._calls(len(self.modes)) if self.observed else None,
            holds_expected=self.holds_expected,
            carries_graph=self.carries_graph,
            with_grad=frozenset(self.with_grad) if self.observed else None,
            rows=tuple((name, on, total) for name, (on, total) in self.rows.items()),
            without_token=self.without_token,
            in_eval=frozenset(self.in_eval),
            unchecked=self.unchecked,
            cut=frozenset(self.cut),
            reached=reached,
            why_unknown=self.why_unknown,
            dropped=frozenset(slots[i] for i in self.dropped if i in slots),
        )


def _column(counts: Mapping[int, int], size: int) -> Ints:
    column = np.zeros(size, np.int64)
    column[list(counts)] = list(counts.values())
    return column


def tensors_in(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    """Find the tensors in whatever a forward returns.

    Args:
        value: A tensor, a mapping, a sequence, a dataclass or an object with attributes.
        depth: How deep to look.

    Yields:
        The tensors.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif depth == 0 or value is None or isinstance(value, str | bytes | int | float | nn.Module):
        return
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from tensors_in(item, depth - 1)
