"""The callback that ``lora-probe run`` gives to a Trainer."""

from __future__ import annotations

import atexit
import os
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
    _name = "Trainer"

    @override
    def attach(self, trainer: Any) -> LoraProbeTrainerCallback:
        self._name = type(trainer).__name__
        pid = os.getpid()
        atexit.register(lambda: self._finish() if os.getpid() == pid else None)
        return super().attach(trainer)

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._finish()  # a train() before, which an exception has ended
        super().on_train_begin(args, state, control, **kwargs)
        self._outcome, self._refused = begin(self._name), False

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

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        try:
            super().on_train_end(args, state, control, **kwargs)
        finally:
            self._finish()

    def _finish(self) -> None:
        if self._outcome is not None:
            self._outcome.end(self.report)


# Checkpoints know a callback by its name: one that was written under the runner goes on without it, and the reverse.
TrainerGuest.__name__ = LoraProbeTrainerCallback.__name__
