"""What an estimator was made of, and where it leads."""

from __future__ import annotations

from dataclasses import dataclass

from lora_probe_callbacks.facts.forward import ForwardFact
from lora_probe_callbacks.facts.words import Mode


@dataclass(frozen=True, slots=True)
class EstimatorFact:
    """One look at an estimator: what it was made of, and where it leads.

    Attributes:
        name: As it was given.
        step: The step in which it was looked at.
        framework_step: Its number in the framework.
        forwards: The forwards of the watched model that made it, as far as they were observed.
        modes: State of every unit after it was made.
        active: The active adapters after it was made.
        graph: What was differentiated carries a graph; None if only gradients or a direction were given.
        reached: Slots that its graph leads to, or None where that is unknown.
        why_unknown: Why ``reached`` is None.
        foreign: Trainable parameters that its graph leads to and that the watched model does not hold.
        without_grad: Calls of the watched model without gradients that may have made it.
        inference: It was made under ``inference_mode``.
        elsewhere: Other models with adapters that are alive; looked for only where no forward explains it.
        direction: Slots that the update direction was built on, or None if there is none.
        direction_foreign: Entries of the direction that are no parameter of the watched model.
        missing: Slots whose gradient of the estimator's loss is None; None if no gradient was seen.
        zero: Looks in a row, this one included, at which all its gradients were exactly zero.
        why_not: Why it could not be computed.
        untrusted: What its self-check found, if that is why.
        count: Its prompts, or None if it was not computed.
        recent: delta_1 and its standard error of the last ones, this one included.
        sure: The sign of the mean of delta_1 over all looks, where a sequence that holds at all of them together
            excludes zero; else 0.
        tail: Why the spread of the prompts of the last one is not to be trusted: a heavy tail in words, or None.
    """

    name: str
    step: int
    framework_step: int
    forwards: tuple[ForwardFact, ...]
    modes: tuple[Mode, ...]
    active: tuple[str, ...]
    graph: bool | None = None
    reached: frozenset[int] | None = None
    why_unknown: str | None = None
    foreign: int = 0
    without_grad: int = 0
    inference: bool = False
    elsewhere: tuple[str, ...] = ()
    direction: frozenset[int] | None = None
    direction_foreign: tuple[str, ...] = ()
    missing: frozenset[int] | None = None
    zero: int = 0
    why_not: str | None = None
    untrusted: str | None = None
    count: int | None = None
    recent: tuple[tuple[float, float], ...] = ()
    sure: int = 0
    tail: str | None = None


@dataclass(frozen=True, eq=False)
class EstimatorFacts:
    """The estimators looked at since the last decision."""

    estimators: tuple[EstimatorFact, ...] = ()
