"""The callback that ``lora-probe run`` gives to a Lightning Trainer."""

from __future__ import annotations

import atexit
import os
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lora_probe_callbacks.integrations.outcomes import Outcome, begin
from lora_probe_callbacks.lightning import LoraProbe

__all__ = ["LightningGuest"]


class LightningGuest(LoraProbe):
    """Reports each ``fit()`` to the runner; a module that cannot be judged is left alone."""

    def __init__(self, **intent: Any) -> None:
        super().__init__(**intent)
        self._outcome: Outcome | None = None
        self._refused = False
        pid = os.getpid()
        atexit.register(lambda: self._finish() if os.getpid() == pid else None)

    @property
    @override
    def state_key(self) -> str:
        return LoraProbe.__qualname__  # checkpoints know a callback by it

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()
        self._outcome, self._refused = begin(f"{type(trainer).__name__} of {type(pl_module).__name__}"), False
        try:
            super().on_train_start(trainer, pl_module)
        except ValueError as error:
            self._refuse(error)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._refused:
            return
        try:
            super().on_train_batch_start(trainer, pl_module, *args)
        except ValueError as error:
            self._refuse(error)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            super().on_train_end(trainer, pl_module)
        finally:
            self._finish()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._finish()

    def _refuse(self, error: ValueError) -> None:
        self._session, self._refused = None, True
        if self._outcome is not None:
            self._outcome.fail(error)

    def _finish(self) -> None:
        if self._outcome is not None:
            self._outcome.end(self.report)
