"""LoraProbe: the front door for Lightning.

Translates Lightning's callback methods into session calls and its loggers into a sink.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lora_probe_callbacks._callback import Door
from lora_probe_callbacks.engine.session import ProbeConfig, ProbeSession
from lora_probe_callbacks.estimators.probe import DirectionName, VarianceProbe
from lora_probe_callbacks.estimators.projections import Backend

__all__ = [
    "AdapterActivationCallback",
    "GradientReachabilityCallback",
    "LoraProbe",
    "VarianceEstimatorCallback",
    "WrapperIdentityCallback",
]


class LoraProbe(Door, Callback):
    """Proves, while training runs, that the LoRA adapter is active, reached, owned, moved and seen.

    Args:
        **intent: What is meant and when to look, see
            :class:`~lora_probe_callbacks.engine.session.ProbeConfig`. Nothing is needed: what can be read
            off the model, PEFT's config and the optimizer is not asked for.

    Raises:
        ValueError: At construction for an argument that cannot be meant; at train start if the
            module holds no adapter, or not the one that was named.
        LoraProbeError: At the step at which something fails, with the reason and the fix, unless
            ``on_failure`` is ``"stop"`` or ``"warn"``.

    Example::

        >>> from lora_probe_callbacks import LoraProbe
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[LoraProbe(every_n_steps=100)], logger=False, max_steps=1)
    """

    def __init__(self, **intent: Any) -> None:
        super().__init__()
        self._config = ProbeConfig(**intent)
        self._session: ProbeSession | None = None
        self._restored: Mapping[str, Any] | None = None
        self._rows: dict[int, dict[str, float]] = {}
        self._shown: float | None = None  # on the progress bar

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._restored = None  # what test() or validate() has loaded is no resume
            self._shown = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._session = None
        try:
            self._open(trainer, pl_module)
        except ValueError:
            # The module's own on_train_start comes after the callbacks': it may attach the adapter.
            if not is_overridden("on_train_start", pl_module):
                raise

    def _open(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        session = ProbeSession(self._config, log=self._keep, main_rank=trainer.is_global_zero)
        if self._restored is not None:
            session.files.load_state_dict(self._restored, whole=True)
        if trainer.checkpoint_callbacks:
            session.files.take_as_whole()
        self._trainer = trainer
        session.start(
            _roots(trainer, pl_module),
            trainer.optimizers,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            framework_step=lambda: trainer.global_step,
            accumulation=trainer.accumulate_grad_batches if pl_module.automatic_optimization else None,
            thaw_announced=any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks),  # type: ignore[attr-defined]
        )
        self._session, self._restored = session, None  # what was restored is of this fit alone
        session.judge_ownership()

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._session is None:
            self._open(trainer, pl_module)
        else:
            self._session.files.written()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._session is not None:
            self._session.gradients_ready(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self._session is None:
            return
        if trainer._logger_connector.should_update_logs:
            self._flush(trainer)
        healthy = self._session.report.metrics.get("lora_probe/healthy")
        # Logging takes half a millisecond, and the bar keeps a value to the end of the epoch.
        if healthy is not None and not trainer.barebones and (healthy != self._shown or batch_idx == 0):
            self._shown = healthy
            pl_module.log("lora_probe/healthy", healthy, prog_bar=True, logger=False, rank_zero_only=True)
        # A collective of Lightning's at every batch, only where somebody may have to stop.
        stoppable = self._config.on_failure == "stop"
        if stoppable and trainer.strategy.reduce_boolean_decision(self._session.should_stop, all=False):
            trainer.should_stop = True

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._session is not None:
            try:
                self._session.end()
            finally:
                self._flush(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._session is not None:
            self._session.abort(exception)
            self._flush(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._session is not None:
            self._session.files.written()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        path = _path_of_save()
        if self._session is not None and path is not None:
            self._session.files.announced(path)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._session is not None:
            self._session.close()
            self._session.files.written()

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._restored or {}) if self._session is None else self._session.files.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _keep(self, metrics: dict[str, float], framework_step: int) -> None:
        # Lightning's loggers count the batches that stepped, which differs from global_step with
        # several optimizers; rows wait for Lightning's own logging cadence.
        behind = self._trainer.global_step - framework_step
        step = self._trainer.fit_loop.epoch_loop._batches_that_stepped - behind
        self._rows.setdefault(step, {}).update(metrics)

    def _flush(self, trainer: pl.Trainer) -> None:
        rows, self._rows = self._rows, {}
        for step, metrics in sorted(rows.items()):
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)


def _path_of_save() -> str | None:
    """Where the checkpoint goes that is being made: no callback is told (lightning 2.6), the caller's caller knows."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:  # as few frames as the profiler and the module's own hooks put between
        if frame.f_code is pl.Trainer.save_checkpoint.__code__:
            path = frame.f_locals.get("filepath")
            return None if path is None else str(path)
        frame = frame.f_back
    return None


def _roots(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[tuple[str, nn.Module]]:
    """The module that is really called: the strategy's wrapper, where there is one."""
    wrapped = trainer.strategy.model
    return [("", wrapped if isinstance(wrapped, nn.Module) else pl_module)]


def _only(prefix: str, intent: dict[str, Any]) -> dict[str, Any]:
    if "select" in intent:
        warnings.warn("select= is what this callback stands for and is ignored; use LoraProbe", stacklevel=3)
    return {**intent, "select": (prefix,)}


class AdapterActivationCallback(LoraProbe):
    """``LoraProbe(select=("LP1",))``: is the adapter active in the forward that trains?

    Args:
        **intent: As for :class:`LoraProbe`.
    """

    def __init__(self, **intent: Any) -> None:
        super().__init__(**_only("LP1", intent))


class WrapperIdentityCallback(LoraProbe):
    """``LoraProbe(select=("LP2",))``: does the optimizer own the tensors that the forward uses?

    Args:
        **intent: As for :class:`LoraProbe`.
    """

    def __init__(self, **intent: Any) -> None:
        super().__init__(**_only("LP2", intent))


class GradientReachabilityCallback(LoraProbe):
    """``LoraProbe(select=("LP3",))``: do the gradients reach the adapter?

    Args:
        **intent: As for :class:`LoraProbe`.
    """

    def __init__(self, **intent: Any) -> None:
        super().__init__(**_only("LP3", intent))


class VarianceEstimatorCallback(LoraProbe):
    """``LoraProbe(estimator=VarianceProbe(...))``, with the checks that concern an estimator.

    Args:
        batches: As for :class:`~lora_probe_callbacks.estimators.VarianceProbe`.
        loss: Likewise.
        direction: Likewise.
        estimate_every_n_steps: Likewise, its ``every_n_steps``.
        example_of_row: Likewise.
        backend: Likewise.
        **intent: As for :class:`LoraProbe`.
    """

    def __init__(
        self,
        batches: Any,
        loss: Callable[[nn.Module, Any], torch.Tensor],
        direction: DirectionName = "from_last_step",
        *,
        estimate_every_n_steps: int = 50,
        example_of_row: Callable[[Any], torch.Tensor] | None = None,
        backend: Backend = "doubled_rank",
        **intent: Any,
    ) -> None:
        estimator = VarianceProbe(
            batches,
            loss,
            direction,
            every_n_steps=estimate_every_n_steps,
            example_of_row=example_of_row,
            backend=backend,
        )
        codes = ("LP1", "LP20", "LP304", "LP305", "LP306", "LP9")
        super().__init__(**{"select": codes, **intent, "estimator": estimator})
