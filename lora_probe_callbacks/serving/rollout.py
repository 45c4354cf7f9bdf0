"""Which policy has sampled? Its log-probs against those of the policy that trains, of earlier ones and of the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_probe_callbacks.facts.serving import RolloutFact, RolloutVerdict
from lora_probe_callbacks.serving.errors import CannotCompareError
from lora_probe_callbacks.serving.live import LiveModel, State
from lora_probe_callbacks.serving.measure import LogProbs, Slope, slope
from lora_probe_callbacks.serving.scoring import Chosen, Rows, log_softmax_of

__all__ = ["Earlier", "Rollout", "compare"]

_SURE = 0.9999  # of an interval: a rollout is looked at in every generation
_NEAR = 0.25  # a slope within this of 0 or 1 is one of them
_FEWEST = 32  # tokens that are worth a look
_TOLD_APART = 0.05  # temperatures, as parts of each other
_FAR = 0.03  # nats a token; what is nearer needs no other explanation
_UNRELATED = 0.5  # correlation
_ASYNCHRONOUS = 2  # updates: less is how asynchronous sampling is meant
_TEMPERATURES = np.exp(np.linspace(math.log(0.4), math.log(2.5), 61))
_TOP_PS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.95, 0.97, 0.98, 0.99)
_SORTED = 2**24  # logits that are sorted for a top-p


@dataclass(frozen=True, slots=True)
class Earlier:
    """The adapter as it was at a former look.

    Attributes:
        step: The step of that.
        values: Name to values.
    """

    step: int
    values: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Rollout:
    """What was sampled.

    Attributes:
        rows: Token ids of whole sequences, prompts included.
        log_probs: Of the last tokens of each, as many as were sampled; NaN for what is unknown.
        temperature: That of sampling, as it was said.
        top_p: Likewise.
    """

    rows: Rows
    log_probs: Sequence[NDArray[np.float64]]
    temperature: float = 1.0
    top_p: float = 1.0

    def taken(self, states: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        """Of log-probs of whole sequences, those of the tokens that were sampled and are known."""
        found = []
        for state, sampled in zip(states, self.log_probs, strict=True):
            known = np.isfinite(sampled)
            found.append(state[len(state) - len(sampled) :][known])
        return found


def compare(
    live: LiveModel, rollout: Rollout, earlier: Sequence[Earlier], step: int, framework_step: int
) -> RolloutFact:
    """Find the policy that has these log-probs.

    Args:
        live: The policy that trains, on the tokens of the rollout.
        rollout: What was sampled.
        earlier: Former states of the adapter, from older to newer.
        step: The present step.
        framework_step: Its number in the framework.

    Returns:
        What was found.

    Raises:
        CannotCompareError: If there are too few log-probs.
    """
    sampled = [values[np.isfinite(values)] for values in rollout.log_probs]
    if sum(map(len, sampled)) < _FEWEST:
        raise CannotCompareError(f"got {sum(map(len, sampled))} log-probs of a rollout, expected {_FEWEST} at least")
    return _Comparison(live, rollout, sampled, step, framework_step).fact(earlier)


class _Comparison:
    def __init__(self, live: LiveModel, rollout: Rollout, sampled: LogProbs, step: int, framework_step: int) -> None:
        self._live = live
        self._rollout = rollout
        self._sampled = sampled
        self._step = step
        self._framework_step = framework_step
        # Engines return log-probs before temperature and top-p are applied, or after.
        settings = dict.fromkeys([(1.0, 1.0), (rollout.temperature, 1.0), (rollout.temperature, rollout.top_p)])
        tried = {setting: self._score(State(), _as(*setting)) for setting in settings}
        self._setting = min(tried, key=lambda setting: _apart(sampled, tried[setting]))
        self._chosen, self._on = _as(*self._setting), tried[self._setting]
        self._off = self._score(live.base, self._chosen)
        self._apart = _apart(sampled, self._on)

    def fact(self, earlier: Sequence[Earlier]) -> RolloutFact:
        if self._unrelated(self._on) and self._unrelated(self._off):
            return self._fact("tokens")
        sampling = self._other_sampling() if self._apart > _FAR else None
        if sampling is not None:
            return sampling
        against_base = self._slope(self._off)
        if _is(against_base, 0.0):
            return self._as_base(earlier)
        late = self._late(earlier)
        if late is not None:
            return late
        if _is(against_base, 1.0):
            return self._fact("same")
        if against_base is not None and (against_base.high < 1 - _NEAR or against_base.low > 1 + _NEAR):
            return self._fact("other")
        return self._fact("undecidable")

    # --- what it may be ---------------------------------------------------------------------

    def _unrelated(self, state: LogProbs) -> bool:
        a, b = np.concatenate(self._sampled), np.concatenate(state)
        if not (a.std() and b.std()):
            return False
        return float(np.corrcoef(a, b)[0, 1]) + 4 / math.sqrt(len(a)) < _UNRELATED

    def _as_base(self, earlier: Sequence[Earlier]) -> RolloutFact:
        """It ignores the adapter; or it has the policy of when B was zero, which is the base."""
        nearest = _apart(self._sampled, self._off)
        as_base = [former.step for former in earlier if _same(self._state_of(former), self._off)]
        if as_base and self._step - max(as_base) < _ASYNCHRONOUS:
            return self._fact("late", nearest=nearest, late=self._step - max(as_base))
        return self._fact("ignored", nearest=nearest)

    def _late(self, earlier: Sequence[Earlier]) -> RolloutFact | None:
        """Of the earlier policies that the sampler may be, the nearest."""
        found: list[tuple[float, int]] = []
        for former in earlier:
            if former.step < self._step:
                state = self._state_of(former)
                if _is(self._slope(state), 0.0):
                    found.append((_apart(self._sampled, state), former.step))
        if not found:
            return None
        nearest, step = min(found)
        return self._fact("late", nearest=nearest, late=self._step - step)

    def _other_sampling(self) -> RolloutFact | None:
        """The temperature, or else the top-p, that halves the distance at least."""
        temperature, top_p = self._setting
        apart, fits = self._nearest(_TEMPERATURES, _at_each(_TEMPERATURES))
        if apart < self._apart / 2 and abs(fits / temperature - 1) > _TOLD_APART:
            return self._fact("sampling", nearest=apart, temperature=fits)
        plain = _at(temperature)
        a, b = np.concatenate(self._sampled), np.concatenate(self._score(State(), plain))
        # Over a top-p every log-prob is larger than over all tokens.
        if (a - b > -_FAR).mean() < 0.95:
            return None
        apart, fits = self._nearest(np.array(_TOP_PS), _over_each(_TOP_PS, plain, temperature))
        if apart < self._apart / 2 and abs(fits - top_p) > _TOLD_APART / 2:
            return self._fact("sampling", nearest=apart, temperature=temperature, top_p=fits)
        return None

    def _nearest(self, values: NDArray[np.float64], chosen: Chosen) -> tuple[float, float]:
        """Distance at, and value of, the one of some settings that comes nearest; [tokens, settings] are scored."""
        scored = np.concatenate(self._score(State(), chosen))
        distances = np.sqrt(((np.concatenate(self._sampled)[:, None] - scored) ** 2).mean(0))
        best = int(distances.argmin())
        return float(distances[best]), float(values[best])

    # --- numbers ----------------------------------------------------------------------------

    def _score(self, state: State, chosen: Chosen) -> LogProbs:
        return self._rollout.taken(self._live.score(state, chosen))

    def _state_of(self, former: Earlier) -> LogProbs:
        return self._score(State(values=former.values), self._chosen)

    def _slope(self, state: LogProbs) -> Slope | None:
        """How far from a state to the policy that trains the sampler is: 0 that state, 1 the policy."""
        if _same(self._on, state):
            return None
        return slope(self._on, state, self._sampled, state, exact=True, confidence=_SURE)

    def _fact(self, verdict: RolloutVerdict, *, nearest: float | None = None, **more: Any) -> RolloutFact:
        return RolloutFact(
            self._step,
            self._framework_step,
            verdict,
            apart=self._apart,
            nearest=self._apart if nearest is None else nearest,
            effect=_apart(self._on, self._off),
            tokens=sum(map(len, self._sampled)),
            declared=(self._rollout.temperature, self._rollout.top_p),
            **more,
        )


def _is(found: Slope | None, value: float) -> bool:
    return found is not None and value - _NEAR < found.low and found.high < value + _NEAR


def _same(a: LogProbs, b: LogProbs) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _apart(a: LogProbs, b: LogProbs) -> float:
    return float(np.sqrt(np.mean((np.concatenate(a) - np.concatenate(b)) ** 2)))


def _as(temperature: float, top_p: float) -> Chosen:
    if top_p == 1.0:
        return _at(temperature)
    over = _over_each([top_p], _at(temperature), temperature)
    return lambda logits, targets: over(logits, targets)[:, 0]


def _at(temperature: float) -> Chosen:
    return lambda logits, targets: log_softmax_of(logits / temperature, targets)


def _at_each(temperatures: NDArray[np.float64]) -> Chosen:
    def chosen(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.stack([log_softmax_of(logits / t, targets) for t in temperatures.tolist()], -1)

    return chosen


def _over_each(top_ps: Sequence[float], plain: Chosen, temperature: float) -> Chosen:
    """Log-probs over the fewest tokens that have a probability of top-p together."""

    def chosen(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        log_probs = plain(logits, targets)
        sums = torch.empty(len(logits), len(top_ps), device=logits.device, dtype=logits.dtype)
        at = torch.arange(len(logits), device=logits.device)
        for rows in torch.split(at, max(1, _SORTED // logits.shape[-1])):
            ordered = (logits[rows] / temperature).softmax(-1).sort(descending=True).values.cumsum(-1)
            for i, top_p in enumerate(top_ps):
                last = (ordered < top_p).sum(-1, keepdim=True).clamp_max(logits.shape[-1] - 1)
                sums[rows, i] = ordered.gather(-1, last)[:, 0]
        return log_probs[:, None] - sums.log()

    return chosen
