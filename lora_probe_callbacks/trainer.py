"""LoraProbeTrainerCallback: the front door for the Transformers Trainer and TRL.

Translates the Trainer's events into session calls, and its history and reporters into a sink.
"""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, Self

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import override

from lora_probe_callbacks._callback import Door
from lora_probe_callbacks._trl import Generations
from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.engine.session import ProbeSession

__all__ = ["LoraProbeTrainerCallback"]


class _Trainer(Protocol):
    """What is used of a ``transformers.Trainer``."""

    train: Callable[..., Any]
    training_step: Callable[..., Any]
    model_wrapped: nn.Module
    callback_handler: Any

    def add_callback(self, callback: TrainerCallback) -> None: ...


class LoraProbeTrainerCallback(Door, TrainerCallback, ExportableState):
    """Proves, while the Trainer runs, that the LoRA adapter is active, reached, owned, moved and seen.

    Metrics go to ``state.log_history`` and to the Trainer's reporters, which write ``train/`` before
    every name; their step is the one under which the Trainer logs the loss of that step.

    The Trainer has no event for an exception. Those of ``training_step``, which runs the forward and the
    backward, are heard all the same: what the probe knows is put on them as a note, and its hooks are taken
    away. If something else raises (another callback, the optimizer), they stay until the next ``train()``
    or until the callback is gone; :meth:`attach` closes that gap as well.

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

    def __new__(cls, **intent: Any) -> Self:
        """Make a callback that a Trainer cannot exchange for another.

        With ``restore_callback_states_from_checkpoint`` the Trainer takes ``type(callback)(**saved)`` in
        place of the object that it was given (transformers 5.23), and the report in the user's hands would
        stay empty. So every callback has a type of its own, which has this one instance; what the user
        says now counts, not what was said when the checkpoint was written.
        """
        own = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__})
        self: Self = super().__new__(own)
        instance = weakref.ref(self)
        own.__new__ = lambda _, **saved: instance()  # type: ignore[assignment, method-assign]
        return self

    def __init__(self, **intent: Any) -> None:
        if hasattr(self, "_config"):
            return
        self._config = ProbeConfig(**intent)
        self._intent = intent
        self._session: ProbeSession | None = None
        self._attached: weakref.ref[Any] | None = None
        self._rows: dict[int, dict[str, float]] = {}
        self._reporters: list[Any] = []
        self._unheard: Callable[[], None] = lambda: None
        self._generations = Generations()
        self._trainer: weakref.ref[Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins anew: hooks and optimizers cannot be copied."""
        return _again, (type(self).__bases__[0], self._intent)

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
        if self._attached is not None and self._attached() is trainer:
            return self
        self._attached = weakref.ref(trainer)
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
        # A checkpoint written without this callback lacks its entry, and the next save asks for it (transformers 5.23).
        callbacks: Any = state.stateful_callbacks
        if isinstance(callbacks, dict):
            callbacks.setdefault(type(self).__name__, self.state())
        if self._session is not None:
            self._session.close()  # what an exception in an earlier train() left behind
            self._unheard()
        self._session = None

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Not in on_train_begin: other callbacks may still change the model there.
        if self._session is not None:
            return
        self._rows = {}
        # Without a reference to this object: the session is closed when nobody holds it any more.
        session = ProbeSession(self._config, log=partial(_keep, self._rows), main_rank=state.is_world_process_zero)
        checkpoint = _folder(args, state)
        stored = _stored(state, type(self).__name__)
        if state.global_step:  # resumed; else what is stored is this callback's own state of a moment ago
            # With save_only_model the Trainer writes none, and the optimizer begins anew by intent (transformers 5.23).
            optimizer = not args.save_only_model or os.path.exists(os.path.join(checkpoint, "optimizer.pt"))
            session.files.load_state_dict(stored, source=checkpoint, whole=optimizer, optimizer_saved=optimizer)
        self._session = session
        weakref.finalize(self, session.close)
        trainer = _trainer_of(state)
        self._trainer = None if trainer is None else weakref.ref(trainer)
        if trainer is not None:
            self._unheard = _hear(trainer, weakref.ref(session))
            weakref.finalize(self, self._unheard)
        callbacks = [] if trainer is None else trainer.callback_handler.callbacks
        self._reporters = [c for c in callbacks if isinstance(c, tuple(INTEGRATION_TO_CALLBACK.values()))]
        # Callbacks are given the model without its wrappers; the forward goes through them.
        # The inner optimizer has the step hooks; the session opens Accelerate's wrapper.
        session.start(
            [("", kwargs["model"] if trainer is None else trainer.model_wrapped)],
            [kwargs["optimizer"]],
            scaler=getattr(kwargs["optimizer"], "scaler", None),
            framework_step=lambda: state.global_step,
            accumulation=args.gradient_accumulation_steps,
            tokenizer=kwargs.get("processing_class"),
        )
        if state.global_step and "fingerprint" not in stored:  # written without this callback
            session.files.restored_from(checkpoint)

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The first update on a generation: the policy is still the one that should have sampled it.
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None or self._session is None:
            return
        with self._session.rollouts.contained():
            batches = self._generations.new(trainer)
            if batches and self._session.rollouts.due:
                tokens, log_probs, temperature, top_p = self._generations.sampled(trainer, batches)
                self.watch_rollout(tokens, log_probs, temperature=temperature, top_p=top_p)

    @override
    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pass_on_stop(control)

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._flush(args, state, control, before=state.global_step)
        self._pass_on_stop(control)

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._session is not None:
            self._session.files.announced(_folder(args, state))
            self._session.files.written()

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_training_stop:  # in on_train_end the reporters have closed their files already
            self._end(args, state, control)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end(args, state, control)

    def _end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if self._session is not None:
            try:
                self._session.end()
            finally:
                self._unheard()
                self._flush(args, state, control)

    def _pass_on_stop(self, control: TrainerControl) -> None:
        if self._session is not None and self._session.should_stop:
            control.should_training_stop = True

    # --- state ------------------------------------------------------------------------------

    @override
    def state(self) -> dict[str, Any]:
        objects = ("estimator", "examples", "tokenizer")
        intent = {name: _plain(value) for name, value in self._intent.items() if name not in objects}
        baseline = None if self._session is None else self._session.files.state_dict()
        return {"args": intent, "attributes": {"_restored": baseline}}

    # --- metrics ----------------------------------------------------------------------------

    def _flush(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, before: int | None = None
    ) -> None:
        """Write the rows that are complete: the update of a step is known when the next one is decided."""
        complete = sorted(step for step in self._rows if before is None or step < before)
        for step in complete:
            metrics = self._rows.pop(step)
            # The history is written before on_log, and reporters stand before user callbacks: both are
            # past when an event reaches this callback, so both are addressed themselves.
            state.log_history.append({**metrics, "epoch": state.epoch, "step": step})
            then = copy.copy(state)
            then.global_step = step
            for reporter in self._reporters:
                reporter.on_log(args, then, control, logs=dict(metrics), model=None)


def _folder(args: TrainingArguments, state: TrainerState) -> str:
    """The checkpoint of the present step."""
    return os.path.join(args.output_dir or "", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _keep(rows: dict[int, dict[str, float]], metrics: dict[str, float], framework_step: int) -> None:
    # The Trainer logs the loss of a step after it has counted that step.
    rows.setdefault(framework_step + 1, {}).update(metrics)


def _trainer_of(state: TrainerState) -> _Trainer | None:
    """The Trainer that a state belongs to: no event hands it to a callback."""
    from transformers import Trainer

    for holder in gc.get_referrers(state):
        # Attributes are held by a dictionary of the object (Python 3.11) or by the object itself (3.13).
        for thing in gc.get_referrers(holder) if type(holder) is dict else [holder]:
            if issubclass(type(thing), Trainer) and thing.state is state:
                found: _Trainer = thing
                return found
    return None


def _hear(trainer: _Trainer, session: weakref.ref[ProbeSession]) -> Callable[[], None]:
    """Hear of the exceptions of a training step, of which no event tells; returns what undoes it."""
    own, step = vars(trainer).get("training_step"), trainer.training_step

    def heard_step(*args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except BaseException as error:
            undo()
            watching = session()
            if watching is not None:
                watching.abort(error)
            raise

    heard_step.own = own  # type: ignore[attr-defined]
    undo = partial(_unhear, weakref.ref(trainer), weakref.ref(heard_step))
    trainer.training_step = heard_step
    return undo


def _unhear(trainer: weakref.ref[Any], heard_step: weakref.ref[Any]) -> None:
    """Holds nothing of the trainer, for it may be called when the callback is gone."""
    holder, mine = trainer(), heard_step()
    if holder is not None and mine is not None and vars(holder).get("training_step") is mine:
        del holder.training_step
        if mine.own is not None:
            holder.training_step = mine.own


def _stored(state: TrainerState, name: str) -> Mapping[str, Any]:
    """What a checkpoint holds of this callback, whether or not the Trainer restores callbacks."""
    callbacks: Any = state.stateful_callbacks
    stored = callbacks.get(name, {}) if isinstance(callbacks, dict) else {}
    stored = stored[0] if isinstance(stored, list) else stored
    restored: Mapping[str, Any] = stored.get("attributes", {}).get("_restored") or {}
    return restored


def _again(kind: type[LoraProbeTrainerCallback], intent: Mapping[str, Any]) -> LoraProbeTrainerCallback:
    return kind(**intent)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return [_plain(v) for v in value] if isinstance(value, list | tuple | set) else str(value)
