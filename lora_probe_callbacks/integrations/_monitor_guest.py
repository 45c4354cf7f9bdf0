"""The monitors that ``lora-probe run`` puts around the loop of an Accelerator."""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim import Optimizer

from lora_probe_callbacks.integrations.outcomes import Outcome, begin
from lora_probe_callbacks.monitor import LoraProbeMonitor

__all__ = ["MonitorGuests"]


class MonitorGuests:
    """The monitors of one Accelerator: one for each model that is prepared with its optimizer, in one call or in two.

    Such a loop has no event for its end: they end with ``end_training()``, ``free_memory()`` or the process.

    Args:
        accelerator: The Accelerator.
    """

    _all: ClassVar[weakref.WeakKeyDictionary[Any, MonitorGuests]] = weakref.WeakKeyDictionary()

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = weakref.ref(accelerator)
        self._models: list[nn.Module] = []  # that wait for an optimizer
        self._optimizers: list[Optimizer] = []  # and the reverse
        self._running: list[tuple[LoraProbeMonitor, Outcome]] = []
        pid = os.getpid()
        atexit.register(lambda: self.finish() if os.getpid() == pid else None)

    @classmethod
    def of(cls, accelerator: Any) -> MonitorGuests:
        """Those of this Accelerator."""
        if accelerator not in cls._all:
            cls._all[accelerator] = cls(accelerator)
        return cls._all[accelerator]

    def prepared(self, things: object, intent: Mapping[str, Any]) -> None:
        """Something was prepared.

        Args:
            things: What ``prepare`` returned.
            intent: Keyword arguments of a monitor.
        """
        for thing in _flat(things):
            if isinstance(thing, nn.Module) and _adapted(thing):
                self._models.append(thing)
            elif isinstance(thing, Optimizer):
                self._optimizers.append(thing)
        if not (self._models and self._optimizers):
            return
        models, self._models = self._models, []
        optimizers, self._optimizers = self._optimizers, []
        outcome = begin(f"Accelerator with {', '.join(type(model).__name__ for model in models)}")
        try:
            monitor = LoraProbeMonitor(models, optimizers, accelerator=self._accelerator(), **intent)
            monitor.__enter__()
        except ValueError as error:
            outcome.fail(error)
        else:
            self._running.append((monitor, outcome))

    def finish(self) -> None:
        """The loop is over, or left by an exception that nobody caught."""
        running, self._running = self._running, []
        error = getattr(sys, "last_value", None)
        for monitor, outcome in running:
            try:
                monitor.__exit__(None if error is None else type(error), error, None)
            finally:
                outcome.end(monitor.report)


def _adapted(model: nn.Module) -> bool:
    return any(isinstance(module, PeftModel | BaseTunerLayer) for module in model.modules())


def _flat(things: object) -> Iterator[object]:
    if isinstance(things, list | tuple):
        for thing in things:
            yield from _flat(thing)
    else:
        yield things
