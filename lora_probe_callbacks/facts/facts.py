"""All that is known at one decision."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lora_probe_callbacks.facts.checkpoint import ResumedFact, SavedFact
from lora_probe_callbacks.facts.estimator import EstimatorFact
from lora_probe_callbacks.facts.forward import ForwardFact, StepResponse
from lora_probe_callbacks.facts.model import (
    BaseDrift,
    CopiesFact,
    Coverage,
    OtherAdapter,
    ReferenceFact,
    SlotFact,
    StartFact,
    TokenRowsFact,
    UnitFact,
)
from lora_probe_callbacks.facts.ranks import SAMPLE, RanksFact, Sample, Sums, Wrapping
from lora_probe_callbacks.facts.update import GradientFact, MoveFact, SlotHistory, StepUpdate
from lora_probe_callbacks.facts.words import Mode, Moment


@dataclass(frozen=True)  # without slots: what every check asks for is worked out once
class Facts:
    """All that is known at one decision.

    ``step`` and ``framework_step`` are of the step being decided; ``update`` tells of an earlier one.
    """

    moment: Moment
    optimizer: int | None  # whose event this is; None at the start, at the end and after an exception
    step: int
    framework_step: int
    expected: tuple[str, ...]
    declared: bool  # the expected names were given, not read off the model
    slots: tuple[SlotFact, ...]
    units: tuple[UnitFact, ...]
    modes: tuple[Mode, ...]  # state of the units now
    active: tuple[str, ...]  # active adapters now
    history: tuple[SlotHistory, ...]
    reads: tuple[int, ...] = ()  # how often the gradient of each slot was looked at
    rates: tuple[float | None, ...] = ()  # learning rates by slot, which schedules change; None without an owner
    forwards: tuple[ForwardFact, ...] = ()
    forwards_without_grad: int = 0
    unobservable: str | None = None  # why forwards cannot be seen at all
    gradients: tuple[GradientFact | None, ...] = ()  # None: not read at this decision
    gradient_norms: tuple[float | None, ...] = ()  # unscaled where the scale is known; None: there was none to read
    gradients_final: bool = False  # nothing can change them between this reading and the update
    update: StepUpdate | None = None
    moves: tuple[MoveFact | None, ...] = ()  # of that update, by slot; empty without one
    others: tuple[OtherAdapter, ...] = ()
    base_drift: BaseDrift | None = None
    trainable_bases: tuple[str, ...] = ()
    replaced: tuple[int, ...] = ()  # slots whose former tensor is still in an optimizer
    copies: CopiesFact | None = None  # None: the optimizer holds no copies of the adapter
    foreign_in_optimizer: int = 0  # optimizer tensors that belong to no watched module
    optimizer_tensors: int = 0
    optimizers: int = 0
    nested: tuple[str, ...] = ()  # adapted layers inside adapted layers
    rewrapped: tuple[str, ...] = ()  # PeftModels inside PeftModels
    unloaded: tuple[str, ...] = ()  # PeftModels whose adapter layers are gone
    vanished: tuple[str, ...] = ()  # tensors that an optimizer steps and whose layer has left the model
    elsewhere: tuple[str, ...] = ()  # other models with adapters that received gradients
    skipped_in_a_row: int = 0
    ever_stepped: bool = False
    scaler: bool = False
    loss_scale: float | None = None
    all_non_finite: bool = False  # nothing that arrived was finite
    packed: tuple[int, int] = (0, 0)  # 4-bit weights in the layout for inference, and all 4-bit weights
    stale_forward: tuple[bool, str] | None = None  # (stale, what was compared)
    why_not_repeated: str | None = None
    estimators: tuple[EstimatorFact, ...] = ()  # looked at since the last decision
    saves: tuple[SavedFact, ...] = ()  # files looked at since the last decision
    restored: ResumedFact | None = None  # compared at this decision
    responses: tuple[StepResponse, ...] = ()  # of the steps in which it was looked for, the last ones
    wrapping: Wrapping | None = None  # None in a run of one process
    shards: Mapping[int, float] = field(default_factory=dict)  # slot of which this rank holds a part, and its weight
    shard_sums: Sums = field(default_factory=Sums)  # of this rank
    sums: Sums | None = None  # of all slots, over all ranks that were heard
    tensor_sample: Sample = (0.0,) * SAMPLE
    gradient_sample: Sample = (0.0,) * SAMPLE
    ranks: RanksFact | None = None  # None: not exchanged at this decision
    resumed: bool | None = None  # as declared
    reference: ReferenceFact | None = None  # None: not declared
    new_tokens: tuple[int, ...] = ()  # as declared
    token_rows: tuple[TokenRowsFact, ...] = ()  # of embeddings in which they can be watched
    start: StartFact | None = None  # read before the first training forward, and kept
    coverage: Coverage | None = None  # likewise
    why_alone: str = "there is one process"  # why nothing will be exchanged; empty while ranks decide together
    why_not_owned: str = ""  # why no tensor of the adapter can be told apart in the optimizer

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
        read = [g for g in self.gradients if g is not None]
        return (
            bool(read)
            and not any(g.present for g in read)
            and self.unobservable is None
            and not any(f.holds_expected for f in self.training_forwards)
        )

    @cached_property
    def called_units(self) -> frozenset[int] | None:
        """Units whose layer ran in a training forward, or None where calls cannot be seen."""
        forwards = self.training_forwards
        if not forwards or any(f.calls is None for f in forwards):
            return None
        return frozenset(u for f in forwards for u, (_, total, _) in enumerate(f.calls or ()) if total)

    @cached_property
    def ungraded_units(self) -> frozenset[int]:
        """Units whose layer ran in the training forwards, but never with gradients enabled."""
        forwards = [f for f in self.training_forwards if f.with_grad is not None]
        graded = frozenset[int]().union(*(f.with_grad for f in forwards if f.with_grad is not None))
        return frozenset(u for u in range(len(self.units)) if u not in graded and any(f.called(u) for f in forwards))

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

    def slots_of_units(self, units: Collection[int]) -> frozenset[int]:
        """The slots that the given units own."""
        return frozenset(s for u in units for s in self.units[u].slots)

    @cached_property
    def intended(self) -> frozenset[int]:
        """The slots that must train: all but those meant to stay frozen."""
        return frozenset(i for i, s in enumerate(self.slots) if not s.frozen_by_intent)

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
        shares = [weights.get(i, others) for i in range(len(self.slots))]
        a, b = ([n if s.role == role else 0.0 for s, n in zip(self.slots, shares, strict=True)] for role in ("A", "B"))
        mine = [[n if i in self.intended else 0.0 for i, n in enumerate(part)] for part in (a, b)]
        numel = [s.numel for s in self.slots]
        change = self.update or StepUpdate(0, 0, (), (), (), (), ())
        stepped = [None if v is None else 1.0 for v in change.moved]
        return Sums(
            gradients=(_squares(self.gradient_norms, mine[0]), _squares(self.gradient_norms, mine[1])),
            received=(_squares(change.gradient_norms, a), _squares(change.gradient_norms, b)),
            moved=(_elements(change.moved, numel, a), _elements(change.moved, numel, b)),
            elements=(_elements(stepped, numel, a), _elements(stepped, numel, b)),
            size=_squares(change.sizes, shares),
            norm=_squares(change.norms, shares),
        )


def _squares(column: Sequence[float | None], shares: Sequence[float]) -> float:
    """The sum of squares over slots; a share of 0 keeps out what is not finite, too."""
    return sum(share * v * v for share, v in zip(shares, column, strict=False) if share and v is not None)


def _elements(column: Sequence[float | None], numel: Sequence[int], shares: Sequence[float]) -> float:
    """The number of elements, of which a column holds fractions."""
    entries = zip(shares, numel, column, strict=False)
    return sum(share * n * v for share, n, v in entries if share and v is not None)
