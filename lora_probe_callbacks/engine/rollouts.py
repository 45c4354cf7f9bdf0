"""The rollouts of one run: is the policy that samples the policy that trains?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.engine.collector import Collector
from lora_probe_callbacks.engine.errors import Errors
from lora_probe_callbacks.engine.run_state import RunState
from lora_probe_callbacks.facts import RolloutFact
from lora_probe_callbacks.observe.forward.hooks import ForwardObserver
from lora_probe_callbacks.observe.model.targets import Targets
from lora_probe_callbacks.serving.errors import CannotCompareError
from lora_probe_callbacks.serving.live import LiveModel
from lora_probe_callbacks.serving.rollout import Earlier, Rollout, compare
from lora_probe_callbacks.serving.scoring import as_rows

__all__ = ["Rollouts"]

_ALWAYS = 8  # looks before their distance counts
_ROWS, _TOKENS = 16, 4096  # of one look at most
_KEPT = 3  # earlier states beside the first


class Rollouts:
    """Compares what was sampled with the policy at that moment, and keeps earlier policies to know them again.

    Args:
        config: How often to look.
        state: Where the run is.
        errors: Errors of our own.
    """

    def __init__(self, config: ProbeConfig, state: RunState, errors: Errors) -> None:
        self._every = config.every_n_steps
        self._state = state
        self._errors = errors
        self._collector: Collector | None = None
        self._first: Earlier | None = None
        self._recent: list[Earlier] = []
        self._made = 0
        self._last = 0

    def begin(self, targets: Targets, hooks: ForwardObserver, collector: Collector) -> None:
        """A run begins.

        Args:
            targets: What is expected to train.
            hooks: Who watches the forwards; sees nothing of what is run here.
            collector: Is given what was found.
        """
        self._targets = targets
        self._hooks = hooks
        self._collector = collector

    def contained(self) -> AbstractContextManager[None]:
        """Read a rollout off a framework; no exception of that leaves this block."""
        return self._errors.contain("check")

    @property
    def due(self) -> bool:
        """A rollout of this step would be looked at."""
        state = self._state
        return state.running and not state.broken and (self._made < _ALWAYS or state.step >= self._last + self._every)

    def watch(self, tokens: Any, log_probs: Any, *, temperature: float = 1.0, top_p: float = 1.0) -> None:
        """Look at a rollout before anything was updated on it: the policy that sampled must be the one that trains.

        The first eight are looked at, then one in ``every_n_steps`` steps. It is judged by the next decision.

        Args:
            tokens: Token ids of whole sequences, prompts included and without padding.
            log_probs: Those of the sampler, of the last tokens of each sequence, in nats; NaN or None where unknown.
            temperature: That of sampling.
            top_p: Likewise.
        """
        state, collector = self._state, self._collector
        if collector is None or not self.due:
            return
        self._made, self._last = self._made + 1, state.step
        with self._errors.contain("check"):
            try:
                found = self._look(_rollout(tokens, log_probs, temperature, top_p))
            except CannotCompareError as error:
                found = RolloutFact(state.step, state.framework_step(), "undecidable", why=f"{error}")
            collector.looks.rollouts.append(found)

    def forget(self) -> None:
        """Let go of all tensors."""
        self._first, self._recent = None, []

    def _look(self, rollout: Rollout) -> RolloutFact:
        step = self._state.step
        with self._hooks.aside():
            live = LiveModel(self._model, rollout.rows)
            earlier = [e for e in (self._first, *self._recent) if e is not None]
            found = compare(live, rollout, earlier, step, self._state.framework_step())
            if not earlier or earlier[-1].step < step:
                self._keep(Earlier(step, live.values()))
        return replace(found, slots=frozenset(range(len(self._targets.slots))))

    def _keep(self, state: Earlier) -> None:
        if self._first is None:
            self._first = state
            return
        self._recent = [*self._recent, state][-_KEPT:]

    @property
    def _model(self) -> nn.Module:
        """The module that holds the adapter."""
        mine = {id(t) for slot in self._targets.slots if (t := slot.tensor) is not None}
        roots = [root for _, root in self._targets.roots]
        return next((r for r in roots if any(id(p) in mine for p in r.parameters())), roots[0])


def _rollout(tokens: Any, log_probs: Any, temperature: float, top_p: float) -> Rollout:
    """A part of the rollout, in plain values."""
    rows = as_rows(tokens)
    sampled = [_values(values) for values in log_probs]
    if len(sampled) != len(rows):
        raise CannotCompareError(
            f"got log-probs of {len(sampled)} sequences for {len(rows)} of tokens, expected as many"
        )
    if wrong := [i for i, (a, b) in enumerate(zip(rows, sampled, strict=True)) if not len(b) < len(a)]:
        raise CannotCompareError(
            f"got {len(sampled[wrong[0]])} log-probs for a sequence of {len(rows[wrong[0]])} tokens, expected fewer: "
            "those of its last tokens, that were sampled"
        )
    chosen: list[int] = []
    for i in range(0, len(rows), -(-len(rows) // _ROWS)):
        if not chosen or sum(len(rows[j]) for j in [*chosen, i]) <= _TOKENS:
            chosen.append(i)
    return Rollout([rows[i] for i in chosen], [sampled[i] for i in chosen], temperature, top_p)


def _values(values: Any) -> Any:
    plain: Sequence[float | None] = values.tolist() if hasattr(values, "tolist") else values
    return np.array([np.nan if v is None else v for v in plain], np.float64)
