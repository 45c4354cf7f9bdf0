"""All that is known at one decision: what every room has seen, side by side."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any

import numpy as np

from lora_probe_callbacks.facts.checkpoint import FileFacts
from lora_probe_callbacks.facts.columns import Bools, Floats, indices
from lora_probe_callbacks.facts.device import DeviceFacts
from lora_probe_callbacks.facts.estimator import EstimatorFacts
from lora_probe_callbacks.facts.forward import ForwardFact, ForwardFacts
from lora_probe_callbacks.facts.model import ModelFacts
from lora_probe_callbacks.facts.ranks import RankFacts, Sums
from lora_probe_callbacks.facts.run import RunFacts, When
from lora_probe_callbacks.facts.serving import ServingFacts
from lora_probe_callbacks.facts.supervision import SupervisionFacts
from lora_probe_callbacks.facts.words import Mode

__all__ = ["Facts"]


@dataclass(frozen=True, eq=False)  # without slots: what several checks ask for is worked out once
class Facts(
    When,
    ModelFacts,
    ForwardFacts,
    DeviceFacts,
    RunFacts,
    EstimatorFacts,
    FileFacts,
    RankFacts,
    SupervisionFacts,
    ServingFacts,
):
    """All that is known at one decision.

    Each room returns its own part; a check reads them as one. ``step`` and ``framework_step`` are of the step being
    decided; ``update`` tells of an earlier one.
    """

    @classmethod
    def of(cls, *parts: object) -> Facts:
        """Put the parts together.

        Args:
            *parts: What the rooms returned, at most one of each kind.

        Returns:
            The facts; what no part tells of is as if there were nothing to see.
        """
        values: dict[str, Any] = {}
        for part in parts:
            values.update({name: getattr(part, name) for name in _fields(type(part))})  # type: ignore[arg-type]
        return cls(**values)

    # --- forwards ---------------------------------------------------------------------------

    @cached_property
    def training_forwards(self) -> tuple[ForwardFact, ...]:
        """The candidates whose output received a gradient; the only candidate if there was but one."""
        received = tuple(f for f in self.forwards if f.received)
        if received:
            return received
        return self.forwards if len(self.forwards) == 1 else ()

    @cached_property
    def nobody_called(self) -> bool:
        """No forward on the expected model was seen, and not one expected gradient is there."""
        return (
            bool(self.gradients.read.any())
            and not self.gradients.present.any()
            and self.unobservable is None
            and not any(f.holds_expected for f in self.training_forwards)
        )

    # --- units ------------------------------------------------------------------------------

    @cached_property
    def called_units(self) -> frozenset[int] | None:
        """Units whose layer ran in a training forward, or None where calls cannot be seen."""
        forwards = self.training_forwards
        if not forwards or any(f.calls is None for f in forwards):
            return None
        return frozenset().union(*(indices(f.calls.total > 0) for f in forwards if f.calls is not None))

    @cached_property
    def ungraded_units(self) -> frozenset[int]:
        """Units whose layer ran in the training forwards, but never with gradients enabled."""
        forwards = [f for f in self.training_forwards if f.with_grad is not None]
        graded = frozenset[int]().union(*(f.with_grad for f in forwards if f.with_grad is not None))
        return frozenset(u for u in set(range(len(self.units))) - graded if any(f.called(u) for f in forwards))

    def bad_units(self, mode: Mode | None = None) -> frozenset[int]:
        """Units that were not active in any training forward (in ``mode``, if one is given)."""
        idle = {u: modes for u, modes in self.odd_modes.items() if "active" not in modes}
        return frozenset(u for u, modes in idle.items() if mode is None or mode in modes)

    @cached_property
    def odd_modes(self) -> Mapping[int, frozenset[Mode]]:
        """Unit to its states in the training forwards, for those that were not active in all of them."""
        if all(f.plainly_active for f in self.training_forwards):
            return {}
        found = {u: frozenset(f.mode(u) for f in self.training_forwards) for u in range(len(self.units))}
        return {u: modes for u, modes in found.items() if modes != {"active"}}

    @cached_property
    def merged_units(self) -> frozenset[int]:
        """Units that were merged in some training forward."""
        return frozenset(u for u, modes in self.odd_modes.items() if "merged" in modes)

    def units_of(self, adapter: str) -> frozenset[int]:
        """The units of one expected adapter."""
        return self._units_by_adapter.get(adapter, frozenset())

    @cached_property
    def _units_by_adapter(self) -> Mapping[str, frozenset[int]]:
        names = dict.fromkeys(unit.adapter for unit in self.units)
        return {name: frozenset(i for i, u in enumerate(self.units) if u.adapter == name) for name in names}

    def low_rank_units_of(self, adapter: str) -> frozenset[int]:
        """Those of them that merging concerns: a ``modules_to_save`` copy cannot be merged."""
        units = self.units_of(adapter)
        return frozenset(u for u in units if self.units[u].lora) or units

    # --- slots ------------------------------------------------------------------------------

    @property
    def intended(self) -> Bools:
        """The slots that must train: all but those meant to stay frozen."""
        return self.slots.intended

    @cached_property
    def intended_slots(self) -> frozenset[int]:
        """The same as numbers, for what is told in numbers: a graph, a direction, a file."""
        return frozenset(indices(self.intended))

    def slots_of_units(self, units: Collection[int]) -> Bools:
        """The slots that the given units own."""
        return self.slots.of_units(units)

    @cached_property
    def on_now(self) -> Bools:
        """The slots whose unit is active or merged at this moment."""
        return np.array([mode in ("active", "merged") for mode in self.modes], np.bool_)[self.slots.unit]

    @cached_property
    def their_turn(self) -> Bools:
        """With several optimizers, toggle_optimizer freezes what the others own: ask at the owner's event."""
        owner = self.slots.owner
        if self.optimizers < 2:
            return np.ones(len(self.slots), np.bool_)
        turn: Bools = (owner < 0) | (owner == self.optimizer)
        return turn

    @cached_property
    def frozen_later(self) -> Bools:
        """Slots that have learned, are frozen now, and for which nothing was thawed in exchange, as in turns."""
        history = self.history
        frozen = self.intended & ~self.slots.requires_grad & history.had_signal & history.had_move
        if not frozen.any():
            return frozen
        last_thaw = history.thawed_at[history.thawed].max(initial=-1)
        found: Bools = frozen & self.on_now & self.their_turn & (history.frozen_since > last_thaw)
        return found

    @cached_property
    def pruned(self) -> Bools:
        """Slots of units whose gate is masked to zero after every step: they have lost their budget."""
        if not self.history.pruned.any():
            return np.zeros(len(self.slots), np.bool_)
        return self.slots_of_units(set(self.slots.unit[self.history.pruned > 0].tolist()))

    @cached_property
    def called_slots(self) -> Bools | None:
        """The slots of units that ran in a training forward, or None where calls cannot be seen."""
        return None if self.called_units is None else self.slots_of_units(self.called_units)

    # --- sums -------------------------------------------------------------------------------

    @cached_property
    def total(self) -> Sums:
        """Sums over all slots: over all ranks where these were heard, else over what this rank holds."""
        return self.sums or self.sums_over({})

    def sums_over(self, weights: Mapping[int, float], *, others: float = 1.0) -> Sums:
        """Sums over slots, for norms over all of them.

        Args:
            weights: Slot to its share: less than 1 for a shard that several ranks hold.
            others: The share of slots that are not in ``weights``.

        Returns:
            Sums of squares and of elements.
        """
        shares = np.full(len(self.slots), others)
        shares[list(weights)] = list(weights.values())
        a, b = (np.where(self.slots.of_role(role), shares, 0.0) for role in ("A", "B"))
        mine_a, mine_b = np.where(self.intended, a, 0.0), np.where(self.intended, b, 0.0)
        there = self.gradients.present
        gradients = _squares(self.gradients.norm, mine_a, there), _squares(self.gradients.norm, mine_b, there)
        if self.update is None:
            return Sums(gradients=gradients)
        change, known, numel = self.update, self.update.stepped, self.slots.numel.astype(np.float64)
        return Sums(
            gradients=gradients,
            received=(
                _squares(change.gradient_norm, a, change.received),
                _squares(change.gradient_norm, b, change.received),
            ),
            moved=(_elements(change.fraction, numel * a, known), _elements(change.fraction, numel * b, known)),
            elements=(float((numel * a)[known].sum()), float((numel * b)[known].sum())),
            size=_squares(change.size, shares, known),
            norm=_squares(change.norm, shares, known),
        )


@cache
def _fields(part: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(part))


def _squares(column: Floats, shares: Floats, known: Bools) -> float:
    """The sum of squares over the slots that have a value; a share of 0 keeps out what is not finite, too."""
    counted = known & (shares != 0.0)
    return float((shares[counted] * column[counted] ** 2).sum())


def _elements(column: Floats, counts: Floats, known: Bools) -> float:
    """The number of elements, of which a column holds fractions."""
    counted = known & (counts != 0.0)
    return float((counts[counted] * column[counted]).sum())
