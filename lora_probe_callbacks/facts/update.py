"""Gradients and updates of the adapter tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class GradientFact(NamedTuple):
    """The kind of gradient that one slot had when it was read, once before the update; its norm stands apart.

    Attributes:
        present: ``.grad`` was not None.
        zero: Every element was exactly zero.
        finite: Every element was finite.
    """

    present: bool
    zero: bool
    finite: bool


class MoveFact(NamedTuple):
    """The kind of change that one step made to one slot; how much stands in ``StepUpdate``.

    Attributes:
        moved: The bits of some element changed, or it is not finite.
        mostly: Those of at least half of its elements did.
        finite: Every element was finite after the step.
    """

    moved: bool
    mostly: bool
    finite: bool


@dataclass(frozen=True, slots=True)
class StepUpdate:
    """The update of one probed step in numbers, judged by the decision that follows it.

    Attributes:
        step: The step that was made.
        framework_step: Its number in the framework.
        starts: By slot, Euclidean norm before the step; None where no optimizer that stepped owns it.
        sizes: Euclidean norm of the change, likewise.
        norms: Euclidean norm after the step, likewise.
        moved: Elements whose bits changed, as a fraction of all, likewise.
        gradient_norms: As the optimizer received the gradient; None where there was none.
    """

    step: int
    framework_step: int
    starts: tuple[float | None, ...]
    sizes: tuple[float | None, ...]
    norms: tuple[float | None, ...]
    moved: tuple[float | None, ...]
    gradient_norms: tuple[float | None, ...]


class SlotHistory(NamedTuple):
    """How often something was seen of one slot, over the probed steps of this session.

    Nothing in here changes while all goes well, so that a verdict on it can stand.
    """

    missing: int = 0  # gradient None, in a row up to now
    zero: int = 0  # gradient exactly zero, in a row up to now
    zero_since: int = 0  # the step in which that row began, while there is one
    rate_zero: int = 0  # learning rate exactly zero, in a row up to now
    rate_rising: bool = False  # it was above the one before
    unmoved: int = 0  # not moved although it had a gradient and a rate, in a row up to now
    lost: int = 0  # fewer than half of its elements moved, likewise
    put_back: int = 0  # a step began with the very values of the one before, which had moved it, in a row up to now
    had_gradient: bool = False  # a gradient other than None was seen
    had_signal: bool = False  # a gradient other than zero was seen
    had_rate: bool = False  # a learning rate other than zero was seen
    had_move: bool = False
