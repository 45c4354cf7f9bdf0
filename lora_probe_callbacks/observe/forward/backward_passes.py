"""Backward passes, counted where they end: at one adapter tensor of each optimizer.

Steps are counted by the optimizers. A loop that stops stepping has no such event any more, so something else must tell
that it goes on: a hook on a single tensor, which takes about a microsecond in a backward, and nothing on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils.hooks import RemovableHandle

__all__ = ["BackwardPasses", "hooked_by_others"]

_SOME = 4  # passes without a step after which nothing is proven of what the optimizer owns
_LONG = 32  # after so many the run is looked at
# ... or so many times as many as the loop has ever accumulated, if that is more
_SOME_TIMES, _LONG_TIMES = 2, 4


@dataclass(frozen=True, slots=True)
class _Arrival:
    """The hook itself, a type of its own: it is told apart from hooks that change gradients."""

    passes: BackwardPasses
    optimizer: int

    def __call__(self, _: torch.Tensor) -> None:
        self.passes.came(self.optimizer)


def hooked_by_others(tensor: torch.Tensor) -> bool:
    """Whether anybody else has put a hook where this module puts its own."""
    hooks = getattr(tensor, "_post_accumulate_grad_hooks", None) or {}
    return not all(type(hook) is _Arrival for hook in hooks.values())


class BackwardPasses:
    """Counts the backward passes that came to the tensors of each optimizer since it has stepped last."""

    def __init__(self) -> None:
        self.since: list[int] = []  # of each optimizer
        self.usual: list[int] = []  # the most between two of its steps
        self.stepped: list[bool] = []
        self._counts: Callable[[], bool] = lambda: True
        self._overdue: Callable[[], None] = lambda: None
        self._hung: dict[int, tuple[torch.Tensor, RemovableHandle]] = {}

    def begin(
        self, optimizers: int, accumulation: int, *, counts: Callable[[], bool], overdue: Callable[[], None]
    ) -> None:
        """Count for so many optimizers.

        Args:
            optimizers: Their number.
            accumulation: Backward passes to a step, as far as anything says it.
            counts: Whether what runs at this moment is the loop's own, and not the probe's.
            overdue: Called in the backward with which they have become too many, and in those that follow it.
        """
        self.remove()
        self._counts, self._overdue = counts, overdue
        self.since, self.usual = [0] * optimizers, [accumulation] * optimizers
        self.stepped = [False] * optimizers

    def hang(self, tensors: Mapping[int, torch.Tensor]) -> None:
        """Count at these tensors from now on.

        Args:
            tensors: Optimizer to one of its tensors. One that is no leaf, or requires no gradient, is passed over.
        """
        for optimizer, tensor in tensors.items():
            if not (tensor.requires_grad and tensor.is_leaf):
                continue
            known = self._hung.get(optimizer)
            if known is not None:
                if known[0] is tensor:
                    continue
                known[1].remove()
            handle = tensor.register_post_accumulate_grad_hook(_Arrival(self, optimizer))  # type: ignore[no-untyped-call]
            self._hung[optimizer] = tensor, handle

    def came(self, optimizer: int) -> None:
        """A backward came to the tensor of an optimizer."""
        if self._counts():
            self.since[optimizer] += 1
            if self.overdue:
                self._overdue()

    def has_stepped(self, optimizer: int) -> None:
        """An optimizer has stepped."""
        self.usual[optimizer] = max(self.usual[optimizer], self.since[optimizer])
        self.since[optimizer] = 0
        self.stepped[optimizer] = True

    @property
    def overdue(self) -> bool:
        """Optimizers have stepped, and by now none of them has for far longer than usual."""
        late = [
            self.since[optimizer] >= max(_LONG, _LONG_TIMES * self.usual[optimizer])
            for optimizer in self._hung
            if self.stepped[optimizer]
        ]
        return bool(late) and all(late)

    @property
    def waited(self) -> set[int]:
        """Optimizers that have stepped before, and by now should have stepped again."""
        pairs = enumerate(zip(self.stepped, self.since, self.usual, strict=True))
        return {optimizer for optimizer, (stepped, since, usual) in pairs if stepped and since >= usual}

    @property
    def lapsed(self) -> list[int]:
        """Optimizers that have stepped before, and not after the passes that they usually wait for."""
        return [
            optimizer
            for optimizer, stepped in enumerate(self.stepped)
            if stepped and self.since[optimizer] >= max(_SOME, _SOME_TIMES * self.usual[optimizer])
        ]

    def remove(self) -> None:
        """Take all hooks away; what was counted stays."""
        for _, handle in self._hung.values():
            handle.remove()
        self._hung.clear()
