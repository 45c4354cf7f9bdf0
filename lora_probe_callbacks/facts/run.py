"""Where a run is, and what has happened in it so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_probe_callbacks.facts.columns import History
from lora_probe_callbacks.facts.path import Path
from lora_probe_callbacks.facts.words import Moment

__all__ = ["Accumulation", "RunFacts", "When"]


@dataclass(frozen=True, eq=False)
class When:
    """Which decision this is.

    Attributes:
        moment: What it was made for.
        optimizer: Whose event it is; None at the start, at the end and after an exception.
        step: The step being decided, of this session, from 0.
        framework_step: The framework's own number of it.
    """

    moment: Moment = "step"
    optimizer: int | None = None
    step: int = 0
    framework_step: int = 0


@dataclass(frozen=True, slots=True)
class Accumulation:
    """What became of the gradients of one step between its backward passes.

    Attributes:
        passes: Backward passes that left gradients.
        lost: Those of them whose gradients were gone before the optimizer had them: cleared before a later pass.
        old: Gradients that were there at the first of them as the step before had left them, and not zero.
        aligned: The cosine between what the last pass had left and what is applied; None where nothing was lost.
    """

    passes: int = 0
    lost: int = 0
    old: int = 0
    aligned: float | None = None


@dataclass(frozen=True, eq=False)
class RunFacts:
    """What has happened in the run up to now.

    Attributes:
        history: How often something was seen of each slot.
        path: Where each slot came from, and what took that back.
        ever_stepped: An optimizer that owns expected tensors has stepped.
        skipped_in_a_row: Steps up to now that were skipped.
        scaler: The loss is scaled.
        loss_scale: By how much, where steps are being skipped.
        steps_of: How often each optimizer has stepped.
        waited_for: Optimizers that own expected tensors, have not stepped once, and are no longer waited for.
        passes: Backward passes since an optimizer that owns expected tensors has stepped last.
        cleared: How often since then the gradients of the adapter were thrown away between two of them.
        saves_whole: Checkpoints hold whole modules, not the adapter alone, as the framework says or a file showed.
        accumulation: Backward passes to a step, as the framework says; None where nothing says it.
        since_step: Backward passes that came to the adapter since each optimizer has stepped last, seen or not.
        usual_passes: The most that came between two steps of each.
        accumulated: What became of the gradients of this step and of the probed ones before it, the last ones.
    """

    history: History = field(default_factory=lambda: History.empty(0))
    path: Path = field(default_factory=lambda: Path.empty(0))
    ever_stepped: bool = False
    skipped_in_a_row: int = 0
    scaler: bool = False
    loss_scale: float | None = None
    steps_of: tuple[int, ...] = ()
    waited_for: tuple[int, ...] = ()
    passes: int = 0
    cleared: int = 0
    accumulation: int | None = None
    since_step: tuple[int, ...] = ()
    usual_passes: tuple[int, ...] = ()
    saves_whole: bool = False
    accumulated: tuple[Accumulation, ...] = ()
