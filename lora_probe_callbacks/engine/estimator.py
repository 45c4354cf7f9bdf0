"""The estimators of one probed run: the session's part that computes one, and looks at those of the user."""

from __future__ import annotations

import dataclasses
import functools
import math
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lora_probe_callbacks.checks.estimator.no_signal import LOOKS
from lora_probe_callbacks.engine.collector import Collector
from lora_probe_callbacks.engine.examples import Examples
from lora_probe_callbacks.engine.run_state import RunState
from lora_probe_callbacks.engine.telling import Teller
from lora_probe_callbacks.estimators._owners import parameters, unwrapped
from lora_probe_callbacks.estimators._self_check import UntrustedProjectionError
from lora_probe_callbacks.estimators.directions import UpdateDirection
from lora_probe_callbacks.estimators.intervals import SignSequence, Spread
from lora_probe_callbacks.estimators.probe import Estimate, VarianceProbe
from lora_probe_callbacks.facts import EstimatorFact
from lora_probe_callbacks.observe.forward.estimator_graph import direction_fact, gradient_fact, graph_fact
from lora_probe_callbacks.observe.forward.hooks import ForwardObserver
from lora_probe_callbacks.observe.model.targets import Targets
from lora_probe_callbacks.observe.model.wrappers import tensor_parallel
from lora_probe_callbacks.restore.model import holding
from lora_probe_callbacks.restore.module_state import module_state_restored

__all__ = ["Estimates", "Estimation", "look"]

_SHARDED = (
    "could not judge: the model is in shards over several ranks, which would all have to run each of its forwards "
    "together; compute the estimator on a whole copy of the model"
)


def look(
    value: object,
    direction: object,
    targets: Targets,
    observer: ForwardObserver,
    *,
    name: str,
    step: int,
    framework_step: int,
) -> EstimatorFact:
    """Look at an estimator of the user's own. Nothing of it is kept.

    Args:
        value: A tensor with a graph, or gradients of the estimator's loss by parameter, id or name.
        direction: mu_Y, or None.
        targets: What is expected to train.
        observer: Who watched the forwards of this step.
        name: What messages call it.
        step: The present step.
        framework_step: Its number in the framework.

    Returns:
        What was seen.
    """
    fields: dict[str, Any] = {"forwards": ()}
    if isinstance(value, torch.Tensor):
        fields |= graph_fact(value, targets, observer)
    elif isinstance(value, Mapping):
        fields |= gradient_fact(value, targets)
    if direction is not None:
        fields |= direction_fact(direction, targets)
    modes, active = observer.log.state()
    return EstimatorFact(name=name, step=step, framework_step=framework_step, modes=modes, active=active, **fields)


class Estimation:
    """Runs a :class:`VarianceProbe` between two steps.

    Args:
        probe: What to compute.
        targets: What is expected to train.
    """

    def __init__(self, probe: VarianceProbe, targets: Targets) -> None:
        self._probe = probe
        self._targets = targets
        self._before: dict[str, torch.Tensor] = {}
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        # A direction that waits for the next training batch, and the parameters to take it at.
        self._waiting: tuple[UpdateDirection, dict[str, torch.Tensor], int, int] | None = None
        self._autocast: tuple[bool, torch.dtype] | None = None
        self._why_not: str | None = None  # what would have been needed before the step, and could not be kept
        self._recent: tuple[tuple[float, float], ...] = ()  # delta_1 and its standard error, of the last ones
        self._sequence = SignSequence()

    def due(self, step: int) -> bool:
        """It runs after this step."""
        return self._probe.due(step)

    def borrows(self, step: int) -> bool:
        """It may wait for the inputs of this step's forward. A matter of numbers alone: ranks must agree on it."""
        return self._probe.share is not None and step > 0 and self._probe.due(step - 1)

    def forward_begins(self, device: torch.device) -> None:
        """Take note of the precision of a training forward: the estimator is run in the same."""
        self._autocast = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))

    def forward_ends(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Borrow the inputs of the first training forward of a step, if it was waited for."""
        if self._waiting is not None and self._inputs is None:
            self._inputs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, dict(kwargs)))

    def stepping(self, step: int) -> None:
        """The update is about to come: keep what it starts from, where it will be asked for."""
        if self._before or not self._probe.due(step):
            return
        try:
            named = parameters(unwrapped(self._model)).items()
            self._before = {name: p.detach().clone() for name, p in named if p.requires_grad}
            self._why_not = None
        except Exception as error:  # out of memory
            self._why_not = _reason(error)

    def forget(self) -> None:
        """Let go of all tensors."""
        self._before, self._inputs, self._waiting = {}, None, None

    def stepped(self, step: int, framework_step: int) -> list[tuple[EstimatorFact, dict[str, float]]]:
        """Directly after the last update of a step: estimate, where it is due.

        Args:
            step: The step that has ended.
            framework_step: Its number in the framework.

        Returns:
            What was seen of each estimate, and its metrics.
        """
        done = []
        if self._before and tensor_parallel([self._model]):
            self._before = {}
            return [(self._fact(step, framework_step, why_not=_SHARDED), {})]
        if self._waiting is not None:
            direction, at, *when = self._waiting
            inputs, self._inputs, self._waiting = self._inputs, None, None
            done.append(self._run(lambda: (direction, self._share(inputs)), at, *when))
        before, self._before = self._before, {}
        if not self._probe.due(step):
            return done
        if self._why_not is not None:
            done.append((self._fact(step, framework_step, why_not=self._why_not), {}))
            self._why_not = None
        elif before:
            if self._probe.share is None:
                at = before if self._probe.looks_ahead else {}
                done.append(self._run(lambda: (self._direction(before), self._batch(step)), at, step, framework_step))
            else:
                done += self._wait(before, step, framework_step)
        return done

    # --- what it is computed from -----------------------------------------------------------

    @property
    def _model(self) -> nn.Module:
        """The module that holds the adapter, as the front door was given it."""
        mine = {id(t) for slot in self._targets.slots if (t := slot.tensor) is not None}
        roots = [root for _, root in self._targets.roots]
        return next((r for r in roots if any(id(p) in mine for p in r.parameters())), roots[0])

    def _direction(self, before: Mapping[str, torch.Tensor]) -> UpdateDirection:
        return self._probe.direction_of(self._model, self._targets.optimizers, before)

    def _batch(self, step: int) -> Any:
        return self._probe.next_batch(step, self._targets.device)

    def _share(self, inputs: tuple[tuple[Any, ...], dict[str, Any]] | None) -> Any:
        if inputs is None:
            raise ValueError("no training forward was seen to take a share of its batch")
        return self._probe.share_of(*inputs)

    def _wait(
        self, before: dict[str, torch.Tensor], step: int, framework_step: int
    ) -> list[tuple[EstimatorFact, dict[str, float]]]:
        """A share is taken of the next training batch, which had no part in this direction."""
        try:
            direction = self._direction(before)
        except Exception as error:
            return [(self._fact(step, framework_step, why_not=_reason(error)), {})]
        owned = parameters(unwrapped(self._model))
        at = before if self._probe.looks_ahead else {n: owned[n].detach().clone() for n in before}
        self._waiting = (direction, at, step, framework_step)
        return []

    # --- computing --------------------------------------------------------------------------

    def _run(
        self,
        prepare: Callable[[], tuple[UpdateDirection, Any]],
        at: Mapping[str, torch.Tensor],
        step: int,
        framework_step: int,
    ) -> tuple[EstimatorFact, dict[str, float]]:
        """Compute one estimate under the eyes of an observer of its own."""
        targets, model = self._targets, self._model
        observer = ForwardObserver(before=lambda module: None, after=None, on_error=_pass_on)
        observer.watch(targets.inventory, targets.units)
        seen: dict[str, Any] = {}
        made_on: dict[str, Any] = {}

        @functools.wraps(self._probe.loss)
        def loss(module: nn.Module, batch: Any) -> torch.Tensor:
            L = self._probe.loss(module, batch)
            if not seen and isinstance(L, torch.Tensor):
                seen.update(graph_fact(L, targets, observer, own=True))
                seen["without_grad"], seen["inference"] = observer.log.without_grad, L.is_inference()
                # Now: afterwards the estimators put back whatever the loss has switched.
                seen["modes"], seen["active"] = observer.log.state()
            return L

        row: dict[str, float] = {}
        why_not = None
        try:
            with ExitStack() as undo:
                undo.enter_context(module_state_restored(model))
                undo.enter_context(self._precision())
                direction, batch = prepare()
                made_on |= direction_fact(direction, targets)
                owned = parameters(unwrapped(model))
                undo.enter_context(holding([owned[n] for n in at], list(at.values())))
                observer.arm()
                undo.callback(observer.disarm)
                estimate, mu_X = self._probe.estimate(model, direction, batch, loss=loss)
                row = _row(estimate)
                self._recent = (*self._recent, (estimate.delta_1, estimate.standard_error))[-LOOKS:]
                self._sequence.add(estimate.delta_1, estimate.standard_error)
                tail = Spread(math.nan, estimate.zeros, estimate.largest).heavy
                seen |= {"count": estimate.count, "recent": self._recent, "sure": self._sequence.sure, "tail": tail}
                got = gradient_fact({owned[n]: g for n, g in mu_X.tensors.items()}, targets)
                seen |= {"missing": got["missing"], "zero": got["zero"]}
        except Exception as error:
            if isinstance(error, UntrustedProjectionError):
                seen["untrusted"] = str(error)
            why_not = _reason(error)
        # The forwards after all that happened in them, the backward included.
        slot_of = targets.slot_of()
        seen["forwards"] = tuple(c.fact(slot_of) for c in observer.log.candidates)
        fact = self._fact(step, framework_step, why_not=why_not, **{**made_on, **seen})
        return fact, row

    def _precision(self) -> Any:
        """That of the training forward, without a cache that may hold the parameters of another time."""
        kind = self._targets.device.type
        enabled, dtype = self._autocast or (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)

    def _fact(self, step: int, framework_step: int, **fields: Any) -> EstimatorFact:
        units = self._targets.units
        return EstimatorFact(
            name=self._probe.name,
            step=step,
            framework_step=framework_step,
            **{
                "forwards": (),
                "modes": tuple(unit.layer.mode(unit.adapter) for unit in units),
                "active": self._targets.inventory.active,
                **fields,
            },
        )


def _row(estimate: Estimate) -> dict[str, float]:
    return {
        f"lora_probe/estimator/{name}": float(value)
        for name, value in estimate._asdict().items()
        if math.isfinite(value)
    }


def _reason(error: Exception) -> str:
    """In words, and without the tensors that the frames of its traceback hold."""
    reason = f"could not judge: {type(error).__name__}: {error}"
    traceback.clear_frames(error.__traceback__)
    return reason


def _pass_on(error: BaseException) -> None:
    raise error


class Estimates:
    """What was looked at of estimators, the user's own and that of a probe, and what waits to be judged.

    Args:
        estimation: Computes the one that was configured; None if there is none.
        examples: Scores the examples of the steps.
        state: Where the run is.
        targets: What is expected to train.
        hooks: Who watches the forwards; sees nothing of what is run here.
        collector: Is given what was seen.
        teller: Is told metrics and reasons.
    """

    def __init__(
        self,
        estimation: Estimation | None,
        examples: Examples,
        state: RunState,
        targets: Targets,
        hooks: ForwardObserver,
        collector: Collector,
        teller: Teller,
    ) -> None:
        self._estimation = estimation
        self.examples = examples
        self._state = state
        self._targets = targets
        self._hooks = hooks
        self._waiting = collector.looks.estimates
        self._teller = teller
        self._zero: dict[str, int] = {}  # looks in a row at which all gradients of one were exactly zero
        self._told: set[str] = set()
        self.broken: dict[str, str] = {}  # estimator to why it could not be computed the last time

    def due(self, step: int) -> bool:
        """An estimate is made after this step."""
        return self._estimation is not None and self._estimation.due(step)

    def borrows(self, step: int) -> bool:
        """An estimate may wait for the inputs of this step's forward."""
        return self._estimation is not None and self._estimation.borrows(step)

    def forward_begins(self) -> None:
        """A training forward begins."""
        if self._estimation is not None:
            self._estimation.forward_begins(self._targets.device)

    def forward_ends(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A training forward has ended."""
        if self._estimation is not None:
            self._estimation.forward_ends(args, kwargs)

    def stepping(self) -> None:
        """The update is about to come."""
        if self._estimation is not None:
            self._estimation.stepping(self._state.step)

    def run(self) -> None:
        """Directly after a step: the estimator, where it is due."""
        if self._estimation is None:
            return
        with self._hooks.aside():
            done = self._estimation.stepped(self._state.step, self._state.framework_step())
        for fact, row in done:
            self._keep(fact)
            if row:
                self._teller.row(row, fact.framework_step)

    def watch(self, value: object, direction: object, name: str) -> None:
        """Look at an estimator of the user's own."""
        step, framework_step = self._state.step, self._state.framework_step()
        self._keep(
            look(value, direction, self._targets, self._hooks, name=name, step=step, framework_step=framework_step)
        )

    def forget(self) -> None:
        """Let go of all tensors."""
        self.examples.forget()
        if self._estimation is not None:
            self._estimation.forget()

    @property
    def questions(self) -> list[str]:
        """What could not be computed, and so keeps the run from being called healthy."""
        unscored = [] if self.examples.broken is None else [f"examples: {self.examples.broken}"]
        return [*unscored, *(f"estimator {name!r}: {reason}" for name, reason in self.broken.items())]

    def _keep(self, fact: EstimatorFact) -> None:
        if fact.missing is not None:
            row = self._zero.get(fact.name, 0) + 1 if fact.zero else 0
            self._zero[fact.name] = row
            fact = dataclasses.replace(fact, zero=row)
        self._waiting.append(fact)
        self.broken.pop(fact.name, None)
        if fact.why_not is None:
            return
        self.broken[fact.name] = fact.why_not
        if fact.why_not not in self._told:
            self._told.add(fact.why_not)
            self._teller.once(f"estimator {fact.name!r}: {fact.why_not}")
