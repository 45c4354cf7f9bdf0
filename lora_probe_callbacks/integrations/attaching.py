"""Attaches the doors to the trainers of a script that knows nothing of them.

Each class is changed in as few places as carry the news: a ``transformers.Trainer`` and a Lightning ``Trainer`` get
the callback when they are made, which also reaches those that override ``train``; an ``Accelerator`` gets a monitor
once it has prepared a model with its optimizer. The doors and their frameworks are imported when that happens.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lora_probe_callbacks.integrations.outcomes import Settings, begin

__all__ = ["attach_to_accelerate", "attach_to_lightning", "attach_to_transformers"]


def attach_to_transformers(trainer_class: Any) -> None:
    """Every Trainer that is made from now on gets a callback.

    Args:
        trainer_class: ``transformers.Trainer``.
    """

    def made(trainer: Any) -> None:
        from lora_probe_callbacks.integrations._trainer_guest import TrainerGuest

        TrainerGuest(**_intent()).attach(trainer)

    _after_init(trainer_class, made)


def attach_to_lightning(trainer_class: Any) -> None:
    """Every Lightning Trainer that is made from now on gets a callback.

    Args:
        trainer_class: ``lightning.pytorch.Trainer``.
    """

    def made(trainer: Any) -> None:
        from lora_probe_callbacks.integrations._lightning_guest import LightningGuest

        callbacks = [*trainer.callbacks, LightningGuest(**_intent())]
        trainer.callbacks = trainer._callback_connector._reorder_callbacks(callbacks)

    _after_init(trainer_class, made)


def attach_to_accelerate(accelerator_class: Any) -> None:
    """Every Accelerator gets a monitor once it has prepared a model with an adapter and an optimizer.

    Args:
        accelerator_class: ``accelerate.Accelerator``.
    """
    prepare = accelerator_class.prepare

    @functools.wraps(prepare)
    def watched_prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(self, *args, **kwargs)
        if not _in_trainer_loop():
            with _contained("Accelerator"):
                from lora_probe_callbacks.integrations._monitor_guest import MonitorGuests

                MonitorGuests.of(self).prepared(prepared, _intent())
        return prepared

    accelerator_class.prepare = watched_prepare
    for name in ("end_training", "free_memory"):  # one ends the process group, the other lets the model go
        setattr(accelerator_class, name, _finished_before(getattr(accelerator_class, name)))


def _in_trainer_loop() -> bool:
    """A ``transformers.Trainer`` prepares with an Accelerator of its own, and has the callback."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_inner_training_loop":  # by name: some copy that method
        frame = frame.f_back
    return frame is not None


def _finished_before(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def finishing(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _contained("Accelerator"):
            from lora_probe_callbacks.integrations._monitor_guest import MonitorGuests

            MonitorGuests.of(self).finish()
        return method(self, *args, **kwargs)

    return finishing


def _intent() -> dict[str, Any]:
    return Settings.of_this_process().intent


def _after_init(trainer_class: Any, made: Callable[[Any], None]) -> None:
    init = trainer_class.__init__

    @functools.wraps(init)
    def watched_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        with _contained(type(self).__name__):
            made(self)

    trainer_class.__init__ = watched_init


@contextmanager
def _contained(where: str) -> Iterator[None]:
    """A guest that cannot come in stays outside, and says so; the script goes on."""
    try:
        yield
    except Exception as error:
        begin(where).fail(error)
