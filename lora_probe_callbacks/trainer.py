"""LoraProbeTrainerCallback: the front door for the Transformers Trainer and TRL.

Translates the Trainer's events into session calls, and its history and reporters into a sink.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import ExportableState
from typing_extensions import override

from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.report.findings import ProbeReport
from lora_probe_callbacks.session import ProbeSession

__all__ = ["LoraProbeTrainerCallback"]


class _Trainer(Protocol):
    """What is used of a ``transformers.Trainer``."""

    train: Callable[..., Any]
    model_wrapped: nn.Module
    callback_handler: Any

    def add_callback(self, callback: TrainerCallback) -> None: ...


class LoraProbeTrainerCallback(TrainerCallback, ExportableState):
    """Proves, while the Trainer runs, that the LoRA adapter is active, reached, owned, moved and seen.

    The Trainer has no event for an exception. If user code raises in a backward, what the probe has
    installed stays until the next ``train()`` or until the callback is gone; :meth:`attach` closes
    that gap, and puts what the probe knows on the exception.

    Args:
        **intent: What is meant and when to look, see :class:`~lora_probe_callbacks.config.ProbeConfig`.

    Raises:
        ValueError: At construction for an argument that cannot be meant; when training starts if the
            model holds no adapter, or not the one that was named.
        LoraProbeError: At the step at which something fails, unless ``on_failure`` is ``"stop"`` or
            ``"warn"``.

    Example::

        probe = LoraProbeTrainerCallback()
        Trainer(model=model, args=args, train_dataset=data, callbacks=[probe]).train()
        print(probe.report)
    """

    def __init__(self, **intent: Any) -> None:
        self._config = ProbeConfig(**intent)
        self._intent = intent
        self._session: ProbeSession | None = None
        self._trainer: weakref.ref[Any] | None = None
        self._restored: Mapping[str, Any] | None = None

    @property
    def report(self) -> ProbeReport:
        """What was found so far."""
        return ProbeReport() if self._session is None else self._session.report

    def attach(self, trainer: Any) -> LoraProbeTrainerCallback:
        """Join a trainer: adds the callback if it is missing, and hears of exceptions.

        Args:
            trainer: A ``transformers.Trainer`` or one derived from it.

        Returns:
            The callback itself.
        """
        joined: _Trainer = trainer
        if self not in joined.callback_handler.callbacks:
            joined.add_callback(self)
        self._trainer = weakref.ref(trainer)
        train = joined.train

        def watched_train(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            except BaseException as error:
                if self._session is not None:
                    self._session.abort(error)
                raise

        joined.train = watched_train
        return self

    # --- events -----------------------------------------------------------------------------

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._session is not None:
            self._session.close()  # what an exception in an earlier train() left behind
        self._session = None

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Not in on_train_begin: other callbacks may still change the model there.
        if self._session is not None:
            return
        session = ProbeSession(
            self._config, log=self._sink(args, state, control), main_rank=state.is_world_process_zero
        )
        session.load_state_dict(self._restored or _stored(state, type(self).__name__))
        self._session = session
        weakref.finalize(self, session.close)
        # The inner optimizer has the step hooks; the session opens Accelerate's wrapper.
        session.start(
            [("", _outermost(kwargs["model"], self._trainer))],
            [kwargs["optimizer"]],
            scaler=_scaler(kwargs["optimizer"]),
            framework_step=lambda: state.global_step,
        )

    @override
    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pass_on_stop(control)

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._pass_on_stop(control)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._session is not None:
            self._session.end()

    def _pass_on_stop(self, control: TrainerControl) -> None:
        if self._session is not None and self._session.should_stop:
            control.should_training_stop = True

    # --- state ------------------------------------------------------------------------------

    @override
    def state(self) -> dict[str, Any]:
        intent = {name: _plain(value) for name, value in self._intent.items() if name != "estimator"}
        baseline = None if self._session is None else self._session.state_dict()
        return {"args": intent, "attributes": {"_restored": baseline}}

    # --- metrics ----------------------------------------------------------------------------

    def _sink(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> Callable[[dict[str, float], int], None]:
        reporters = list(_reporters(self, self._trainer))

        def log(metrics: dict[str, float], framework_step: int) -> None:
            # The history is written before on_log, and reporters stand before user callbacks: both are
            # past when an event reaches this callback, so both are addressed themselves.
            state.log_history.append({**metrics, "epoch": state.epoch, "step": framework_step})
            then = copy.copy(state)
            then.global_step = framework_step
            for reporter in reporters:
                reporter.on_log(args, then, control, logs=dict(metrics), model=None)

        return log


def _reporters(callback: TrainerCallback, trainer: weakref.ref[Any] | None) -> Iterator[TrainerCallback]:
    """The Trainer's own writers (TensorBoard, W&B and so on), which stand in one list with the callback."""
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    joined = None if trainer is None else trainer()
    if joined is not None:
        lists = [joined.callback_handler.callbacks]
    else:
        lists = [r for r in gc.get_referrers(callback) if isinstance(r, list)]
    seen: set[int] = set()
    for one in lists:
        for other in one:
            if isinstance(other, kinds) and id(other) not in seen:
                seen.add(id(other))
                yield other  # type: ignore[misc]


def _outermost(model: nn.Module, trainer: weakref.ref[Any] | None) -> nn.Module:
    """The module that is really called: callbacks are given the model without its wrappers."""
    joined = None if trainer is None else trainer()
    if joined is not None:
        wrapped: nn.Module = joined.model_wrapped
        return wrapped
    for _ in range(8):
        holders = [m for m in _holders(model) if type(m).__module__.startswith(("torch.", "accelerate.", "deepspeed."))]
        if len(holders) != 1:
            return model
        model = holders[0]
    return model


def _holders(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that hold ``model`` as a child."""
    for children in gc.get_referrers(model):
        if isinstance(children, dict):
            for attributes in gc.get_referrers(children):
                for owner in gc.get_referrers(attributes) if isinstance(attributes, dict) else (attributes,):
                    if isinstance(owner, nn.Module) and owner._modules is children:
                        yield owner


def _scaler(optimizer: object) -> Any:
    return getattr(optimizer, "scaler", None)


def _stored(state: TrainerState, name: str) -> Mapping[str, Any]:
    """What a checkpoint holds of this callback, also where the Trainer does not restore callbacks."""
    callbacks: Any = state.stateful_callbacks  # a mapping once it was read from a checkpoint
    stored = callbacks.get(name, {}) if isinstance(callbacks, dict) else {}
    stored = stored[0] if isinstance(stored, list) else stored
    restored: Mapping[str, Any] = stored.get("attributes", {}).get("_restored") or {}
    return restored


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return [_plain(v) for v in value] if isinstance(value, list | tuple | set) else str(value)
