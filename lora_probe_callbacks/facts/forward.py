"""What was seen of the forwards of one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lora_probe_callbacks.facts.columns import Ints
from lora_probe_callbacks.facts.words import Mode


@dataclass(frozen=True, eq=False, slots=True)
class Calls:
    """The calls of the layers inside one forward, one entry a unit.

    Attributes:
        active: With the adapter active.
        total: In any state.
        odd: Unit to its state in the last call in which its adapter was not active.
    """

    active: Ints
    total: Ints
    odd: Mapping[int, Mode]


@dataclass(frozen=True, slots=True)
class ForwardFact:
    """One candidate for a training forward: an outermost call with gradients enabled.

    Attributes:
        module: Name and class of the outermost module that was called.
        received: A gradient arrived at its output.
        modes: State of every unit when the call began.
        active: Names of the active adapters when the call began.
        modes_at_backward: The same when the gradient arrived, or None before that.
        active_at_backward: The same for the active names.
        calls: Calls of the units' layers inside, or None where layers cannot be observed.
        reached: Slots that the graph of the output leads to, or None where that is unknown.
        why_unknown: Why ``reached`` is None.
    """

    module: str
    received: bool
    modes: tuple[Mode, ...]
    active: tuple[str, ...]
    modes_at_backward: tuple[Mode, ...] | None
    active_at_backward: tuple[str, ...] | None
    calls: Calls | None
    reached: frozenset[int] | None
    why_unknown: str | None
    with_grad: frozenset[int] | None = None  # units whose layer ran with gradients enabled
    holds_expected: bool = True  # some expected unit lies below the called module
    carries_graph: bool = True  # some output requires gradients
    dropped: frozenset[int] = frozenset()  # slots behind an operation without a backward
    rows: tuple[tuple[str, int, int], ...] = ()  # adapter, rows of the batch that ran with it, and all rows
    without_token: int = 0  # rows in which aLoRA found no invocation token
    in_eval: frozenset[int] = frozenset()  # units whose dropout is configured and was off
    unchecked: int = 0  # modules whose checkpointing is on, and which do not checkpoint as they are in eval mode
    cut: frozenset[int] = frozenset()  # units inside a reentrant checkpoint none of whose inputs requires gradients

    def mode(self, unit: int) -> Mode:
        """State of a unit in this forward: what its own calls saw, else the state at the beginning."""
        if self.calls is not None and self.calls.total[unit]:
            return "active" if self.calls.active[unit] else self.calls.odd.get(unit, "active")
        return self.modes[unit]

    @property
    def plainly_active(self) -> bool:
        """Every unit was active from the beginning and in each of its calls."""
        return set(self.modes) <= {"active"} and not (self.calls and self.calls.odd)

    def called(self, unit: int) -> bool | None:
        """Whether the layer of a unit was called, None where that cannot be seen."""
        return None if self.calls is None else bool(self.calls.total[unit])


@dataclass(frozen=True, slots=True)
class StepResponse:
    """What the loss does where the adapter is moved a little, and what the gradient of one step says of that.

    Attributes:
        step: The step.
        framework_step: Its number in the framework.
        slots: The tensors that were moved; of several in the same memory, the first.
        sixteen: Something in the forward is rounded to 16 bits.
        predicted: Sum of gradient times update.
        measured: Change of the outputs by the update, times the gradient that had arrived at them.
        central: A central difference along the gradient over what the gradient says: 1 if it is right.
        change: What the gradient says, in units of the loss.
        bend: How far the middle lies off the line between both ends, twice, in units of the loss.
        sides: What the half ahead and the half behind say alone. This and what follows is measured only as long as
            nothing before it settles the question.
        near: The central difference over a quarter of the distance: where it is another, the loss is curved.
        own: The central difference for a gradient made anew from the outputs alone, a little aside and at half the
            distance.
        again: The same at the whole distance.
        stray: Of tensors whose gradient is exactly zero: the change of the loss where they are moved at random, over
            what the gradient of all tensors says of the same distance.
        outside: Where the loss is made outside the model: how far its change is from what arrived at the outputs says,
            where these are moved at random, in standard deviations of what that says.
        outside_noise: What rounding and curvature make of it.
        noise: What rounding makes of the others, at least.
        why_not: Why nothing was measured.
        passing: That may be over in the next step.
    """

    step: int
    framework_step: int
    slots: tuple[int, ...] = ()
    sixteen: bool = False
    predicted: float | None = None
    measured: float | None = None
    central: float | None = None
    change: float | None = None
    bend: float | None = None
    sides: tuple[float, float] | None = None
    near: float | None = None
    own: float | None = None
    again: float | None = None
    stray: float | None = None
    outside: float | None = None
    outside_noise: float = 0.0
    noise: float = 0.0
    why_not: str | None = None
    passing: bool = False


@dataclass(frozen=True, slots=True)
class ReferenceFact:
    """The forwards beside training, where the loss compares with this model, its adapters disabled.

    Attributes:
        disabled: Some forward of this session ran with the adapters disabled.
        active: Probed steps up to now in which forwards beside training ran, all with an adapter active.
    """

    disabled: bool
    active: int


@dataclass(frozen=True, eq=False)
class ForwardFacts:
    """What was seen of the forwards since the last decision.

    Attributes:
        forwards: The candidates for a training forward, in their order.
        forwards_without_grad: Outermost calls without gradients.
        ran_beside: Units whose layer ran in one of these.
        unobservable: Why forwards cannot be seen at all.
        reference: Forwards of the reference; None where none was declared.
        stale_forward: Whether the forward went on with old weights, and what was compared.
        why_not_repeated: Why that was not looked at.
        responses: Measurements of the gradient, the last ones.
        measured: The last step at which the gradient of each slot was measured and right, -1 where it was not; of no
            slot at all where nothing was measured.
        elsewhere: Other models with adapters that received gradients.
        backward_called: Some backward ran since the first forward of this step; None where nobody looked.
    """

    forwards: tuple[ForwardFact, ...] = ()
    forwards_without_grad: int = 0
    ran_beside: frozenset[int] = frozenset()
    unobservable: str | None = None
    reference: ReferenceFact | None = None
    stale_forward: tuple[bool, str] | None = None
    why_not_repeated: str | None = None
    responses: tuple[StepResponse, ...] = ()
    measured: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    elsewhere: tuple[str, ...] = ()
    backward_called: bool | None = None
