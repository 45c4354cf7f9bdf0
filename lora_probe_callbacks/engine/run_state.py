"""Where a run is: the numbers that its parts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lora_probe_callbacks.facts import Accumulation, History, Path, RunFacts
from lora_probe_callbacks.observe.forward.backward_passes import BackwardPasses

__all__ = ["RunState"]


@dataclass(slots=True)
class RunState:
    """The present state of one run.

    Attributes:
        framework_step: The framework's own step counter.
        accumulation: Backward passes to a step, as the framework says.
        tokenizer: Of the model, as the user or the framework hands it over; None if nobody does.
        thaw_announced: The framework will thaw what is frozen now.
        step: The present step of this session, from 0.
        running: Between start and end.
        broken: The probe has stepped aside after an error of its own.
        ever_stepped: An optimizer that owns expected tensors has stepped.
        skipped_in_a_row: Steps up to now that were skipped.
        steps_of: How often each optimizer has stepped.
        given_up: Optimizers that own expected tensors and are not waited for, since the others step and they do not.
        passes: Backward passes since such an optimizer has stepped last.
        cleared: How often since then gradients were thrown away.
        merges: Times that a layer was seen merged.
        was_active: Names of the adapters that were active in some forward.
        saves_whole: Checkpoints hold whole modules, not the adapter alone.
        accumulated: What became of the gradients of the last probed steps.
        history: What was seen of each slot.
        backwards: Backward passes, counted in every step.
        path: Where each came from.
    """

    framework_step: Callable[[], int]
    accumulation: int | None = None
    tokenizer: object = None
    thaw_announced: bool = False
    step: int = 0
    running: bool = False
    broken: bool = False
    ever_stepped: bool = False
    skipped_in_a_row: int = 0
    steps_of: list[int] = field(default_factory=list)
    given_up: set[int] = field(default_factory=set)
    passes: int = 0
    cleared: int = 0
    merges: int = 0
    was_active: set[str] = field(default_factory=set)
    saves_whole: bool = False
    accumulated: tuple[Accumulation, ...] = ()
    history: History = field(default_factory=lambda: History.empty(0))
    backwards: BackwardPasses = field(default_factory=BackwardPasses)
    path: Path = field(default_factory=lambda: Path.empty(0))

    def has_stepped(self) -> None:
        """An optimizer that owns expected tensors has stepped."""
        self.ever_stepped = True
        self.skipped_in_a_row = self.passes = self.cleared = 0

    def facts(self, *, skipped: int, passes: int, scaler: bool, loss_scale: float | None) -> RunFacts:
        """What a decision may know of it.

        Args:
            skipped: Steps in a row that were skipped, the one being decided included.
            passes: Backward passes, those of the step being decided included.
            scaler: The loss is scaled.
            loss_scale: By how much, where it was read.

        Returns:
            The facts.
        """
        return RunFacts(
            history=self.history,
            path=self.path,
            ever_stepped=self.ever_stepped,
            skipped_in_a_row=skipped,
            scaler=scaler,
            loss_scale=loss_scale,
            steps_of=tuple(self.steps_of),
            waited_for=tuple(sorted(self.given_up)),
            passes=passes,
            cleared=self.cleared,
            accumulation=self.accumulation,
            since_step=tuple(self.backwards.since),
            usual_passes=tuple(self.backwards.usual),
            saves_whole=self.saves_whole,
            accumulated=self.accumulated,
        )
