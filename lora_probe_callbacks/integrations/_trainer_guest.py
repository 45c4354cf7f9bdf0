"""The callback that ``lora-probe run`` gives to a Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from lora_probe_callbacks.integrations.outcomes import Outcome, begin
from lora_probe_callbacks.trainer import LoraProbeTrainerCallback

__all__ = ["TrainerGuest"]


class TrainerGuest(LoraProbeTrainerCallback):
    """Reports each ``train()`` to the runner; a model that cannot be judged is left alone."""

    _outcome: Outcome | None = None
    _refused = False
    _judges: LoraProbeTrainerCallback | None = None  # a callback that the script itself has added

    @override
    def attach(self, trainer: Any) -> LoraProbeTrainerCallback:
        super().attach(trainer)
        train = trainer.train

        def reported_train(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            finally:
                self._finish()

        trainer.train = reported_train
        return self

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        trainer: Any = None if self._attached is None else self._attached()
        callbacks = [] if trainer is None else trainer.callback_handler.callbacks
        others = [c for c in callbacks if isinstance(c, LoraProbeTrainerCallback) and c is not self]
        self._judges = others[0] if others else None
        self._refused = bool(others)
        self._outcome = begin(type(trainer).__name__)

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._refused:
            return
        try:
            super().on_step_begin(args, state, control, **kwargs)
        except ValueError as error:
            self._session, self._refused = None, True
            if self._outcome is not None:
                self._outcome.fail(error)

    def _finish(self) -> None:
        if self._outcome is not None:
            self._outcome.end((self._judges or self).report)
            self._outcome = None


# Checkpoints know a callback by its name: one that was written under the runner goes on without it, and the reverse.
TrainerGuest.__name__ = LoraProbeTrainerCallback.__name__
