"""The callback that ``lora-probe run`` gives to a Lightning Trainer."""

from __future__ import annotations

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
        self._judges: LoraProbe = self  # or a callback that the script itself has given

    @property
    @override
    def state_key(self) -> str:
        return LoraProbe.__qualname__  # checkpoints know a callback by it

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks: list[pl.Callback] = vars(trainer)["callbacks"]
        others = [c for c in callbacks if isinstance(c, LoraProbe) and c is not self]
        self._judges, self._refused = (others or [self])[0], bool(others)
        self._session = None
        self._outcome = begin(f"{type(trainer).__name__} of {type(pl_module).__name__}")
        if others:
            return
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
            self._outcome.end(self._judges.report)
            self._outcome = None
