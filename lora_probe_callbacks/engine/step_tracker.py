"""What a step is.

From the end of the last one until every optimizer that owns adapter tensors has stepped, or its
gradients were thrown away. Pure bookkeeping over the numbers of the optimizers; it knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field

__all__ = ["StepTracker"]

# An optimizer may step several times while another one accumulates; a step does not wait for ever.
_PATIENCE = 16


@dataclass(slots=True)
class StepTracker:
    """Which optimizers did what in the present step.

    Attributes:
        decided: The decision of this step was made.
        ready: Optimizers whose gradients were announced.
        inside: Optimizers inside their ``step()``.
        stepped: Optimizers that have stepped.
        discarded: Optimizers whose gradients were thrown away.
        left_to_it: A fused optimizer decides by itself, on its device, whether to skip this step.
    """

    decided: bool = False
    ready: set[int] = field(default_factory=set)
    inside: set[int] = field(default_factory=set)
    stepped: set[int] = field(default_factory=set)
    discarded: set[int] = field(default_factory=set)
    left_to_it: bool = False
    _times: dict[int, int] = field(default_factory=dict)

    def done(self, owners: set[int]) -> bool:
        """Every owner has stepped or has nothing left to step."""
        return owners <= self.stepped | self.discarded

    def has_stepped(self, optimizer: int, *, left_to_it: bool = False) -> None:
        """An optimizer has returned from ``step()``."""
        self.left_to_it |= left_to_it
        self.inside.discard(optimizer)
        self.stepped.add(optimizer)
        self._times[optimizer] = self._times.get(optimizer, 0) + 1

    def begins_again(self, optimizer: int, owners: set[int], has_gradients: Callable[[int], bool]) -> set[int]:
        """An optimizer that has stepped begins anew: what the others hold tells whether to wait for them.

        Args:
            optimizer: The one that begins again.
            owners: Optimizers that are waited for.
            has_gradients: Whether an optimizer still holds gradients.

        Returns:
            Those that hold gradients and are waited for no longer.
        """
        left = owners - self.stepped
        impatient = self._times.get(optimizer, 0) >= _PATIENCE
        self.discarded |= left if impatient else {other for other in left if not has_gradients(other)}
        return {other for other in left if has_gradients(other)} if impatient else set()

    def announced_twice(self, optimizer: int) -> bool:
        """Announced before in this step, and not stepped since: that first time was skipped."""
        return optimizer in self.ready and optimizer not in self.inside | self.stepped

    def next_forward(
        self,
        backward_seen: bool,
        owners: set[int],
        has_gradients: Callable[[int], bool],
        *,
        went_on: bool,
        waited: Set[int] = frozenset(),
    ) -> None:
        """A training forward begins: what was announced and never stepped was skipped.

        Args:
            backward_seen: A gradient arrived at an output in this step.
            owners: Optimizers that own adapter tensors.
            has_gradients: Whether an optimizer still holds gradients.
            went_on: A scaler was updated: what it had to step is stepped or skipped.
            waited: Optimizers for which there were as many backward passes as they usually wait for.
        """
        if self.inside:
            return  # a closure that is evaluated several times, as LBFGS does
        self.discarded |= self.ready - self.stepped
        if not self.ready & owners and backward_seen:
            # Gradients were made, no owner came, and they are gone: skipped by a scaler, cleared with those of an
            # optimizer that does step, or after as many passes as were usual. As long as they are there, the loop
            # accumulates; before that, it clears between two backward passes of one step.
            due = owners if went_on or self.stepped else owners & waited
            self.discarded |= {o for o in due if went_on or not has_gradients(o)}
