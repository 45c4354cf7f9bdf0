"""Which state of the live model has the log-probs that are served?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from lora_probe_callbacks.facts.serving import ServedFact
from lora_probe_callbacks.serving.live import LiveModel, State
from lora_probe_callbacks.serving.measure import Fit, LogProbs, Slope, misfit, slope, tokens_needed

__all__ = ["Scored", "diagnose"]

CLOSE = 0.1  # of the effect: what is as near as this behaves the same
_FAR = 0.3  # of the effect: what is as far as this is no explanation, however wide its bounds are
_DECIDED = 0.25  # half width of an interval that tells 1 from one half, and one half from 0
_RELATED = 0.7  # correlation of effects that are of one adapter
_ALONE = 256  # layers at most that are switched off one by one
_MANY, _FLIPS = 64, 6  # groups at most that are tried again in combination, and how often

_Groups = Mapping[str, frozenset[int]]  # name to numbers of layers


@dataclass(frozen=True, slots=True)
class Scored:
    """A target, scored on the tokens of the live model.

    Attributes:
        target: What it is, in words.
        served: Its log-probs.
        base: Those of its own base.
        on: The live log-probs that it is compared with, where these are not the ones of the live model itself.
        off: Likewise without the adapter.
        best: Those of the live model, merged exactly and rounded to the type of the target.
        dtype: That type.
        merged: The adapter is in its weights.
        checkpoints: Where earlier states of the adapter are.
    """

    target: str
    served: LogProbs
    base: LogProbs
    on: LogProbs | None = None
    off: LogProbs | None = None
    best: LogProbs | None = None
    dtype: str = ""
    merged: bool = False
    checkpoints: Sequence[Path] = field(default=())


def diagnose(live: LiveModel, scored: Scored, checkpoints: Sequence[Path] = ()) -> ServedFact:
    """Compare a target with the live model and find out what it is.

    Args:
        live: The model that was trained.
        scored: The target.
        checkpoints: Earlier states of the adapter.

    Returns:
        What was found.
    """
    on, off = scored.on or live.on, scored.off or live.off
    found = slope(on, off, scored.served, scored.base, exact=live.exact or scored.on is not None)
    fit = misfit(on, off, scored.served, scored.base, found.effect)
    fact = ServedFact(
        scored.target,
        "served",
        merged=scored.merged,
        slope=found.value,
        low=found.low,
        high=found.high,
        correlation=found.correlation,
        effect=found.effect,
        noise=found.noise,
        tokens=found.tokens,
        lost=fit.part,
        dtype=scored.dtype,
        layers=len(live.layers),
    )
    if scored.best is not None:
        fact = replace(fact, best=misfit(on, off, scored.best, scored.base, found.effect).part)
    if not found.effect:
        return replace(fact, verdict="undecidable", needed=tokens_needed(found))
    decided = found.half_width <= _DECIDED
    if _is_close(fit) and (decided or fit.high <= 2 * CLOSE) and _overlaps(found, 1.0):
        return fact
    if not decided and fit.low <= CLOSE:
        return replace(fact, verdict="undecidable", needed=tokens_needed(found))
    if scored.merged and fact.best is not None and fit.low <= 2 * fact.best:
        return replace(fact, verdict="lossy")
    return _Search(live, scored, off, found, fact).verdict([*checkpoints, *scored.checkpoints])


def _is_close(fit: Fit) -> bool:
    """It may be the same, and is not far from it."""
    return fit.low <= CLOSE and fit.part <= _FAR


def _overlaps(found: Slope, value: float) -> bool:
    return found.low <= value + CLOSE / 2 and value - CLOSE / 2 <= found.high


class _Search:
    """Tries the states that the live model can be in, the simplest first.

    Args:
        live: The model that was trained.
        scored: The target.
        off: Live log-probs without the adapter.
        found: The slope.
        fact: What is known so far.
    """

    def __init__(self, live: LiveModel, scored: Scored, off: LogProbs, found: Slope, fact: ServedFact) -> None:
        self._live = live
        self._scored = scored
        self._off = off
        self._found = found
        self._fact = fact

    def verdict(self, checkpoints: Sequence[Path]) -> ServedFact:
        """The first state that fits, or what can be said without one."""
        fits: list[tuple[float, ServedFact]] = []
        for state, fact in self._states(checkpoints):
            fit = self._fit(state)
            if _is_close(fit):
                fits.append((fit.part, replace(fact, lost=self._fact.lost)))
        if fits:
            best = min(part for part, _ in fits)
            # What fits as well as the best, and is the simplest.
            return next(fact for part, fact in fits if part <= best + CLOSE / 2)
        return self._scaled() or self._in_part() or self._unexplained()

    def _states(self, checkpoints: Sequence[Path]) -> Iterator[tuple[LogProbs, ServedFact]]:
        yield self._off, replace(self._fact, verdict="ignored")
        for other in self._live.others:
            yield self._live.score(State(adapter=other)), replace(self._fact, verdict="other-adapter", other=other)
        for path in checkpoints:
            values = self._live.stored(path)
            yield (
                self._live.score(State(values=values)),
                replace(self._fact, verdict="stale", checkpoint="/".join(path.parts[-2:])),
            )

    def _fit(self, state: LogProbs) -> Fit:
        return misfit(state, self._off, self._scored.served, self._scored.base, self._found.effect)

    # --- another scale ----------------------------------------------------------------------

    def _scaled(self) -> ServedFact | None:
        """All of the adapter at another scale: where the slope is 1 there is none to look for."""
        if self._found.correlation < _RELATED or not np.isfinite(self._found.value):
            return None
        best, at = self._fit(self._live.on), 1.0
        for spacing in (2.0, 1.19, 1.04):
            for _ in range(6):
                tried = [(self._fit(self._live.score(State(scale=at * f))), at * f) for f in (1 / spacing, spacing)]
                fit, scale = min(tried, key=lambda one: one[0].part)
                if fit.part >= best.part:
                    break
                best, at = fit, scale
        if _is_close(best) and at != 1.0:
            return replace(self._fact, verdict="lossy", scale=at)
        return None

    # --- a part of it -----------------------------------------------------------------------

    def _in_part(self) -> ServedFact | None:
        """Layers that are switched off on the live side until it fits."""
        names = [layer.name for layer in self._live.layers]
        whole = self._fit(self._live.on)
        nearest: tuple[Fit, frozenset[int], str] | None = None
        for groups in _groupings(names):
            fit, missing = self._descended(groups, self._guess(groups))
            off = _union(groups, missing)
            if 0 < len(off) < len(names) and (nearest is None or fit.part < nearest[0].part):
                nearest = fit, off, _in_words(groups, missing)
            if _is_close(fit):
                break
        if nearest is None or not (_is_close(nearest[0]) or nearest[0].part < whole.part / 4):
            return None
        lacking = tuple(names[i] for i in sorted(nearest[1]))
        return replace(self._fact, verdict="partly", off=lacking, where=nearest[2])

    def _guess(self, groups: _Groups) -> frozenset[str]:
        """The groups without which the live model would come nearest, if their effects added up."""
        on, off = np.concatenate(self._live.on), np.concatenate(self._live.off)
        wanted = on - off - (np.concatenate(self._scored.served) - np.concatenate(self._scored.base))
        columns = [on - np.concatenate(self._live.score(State(off=group))) for group in groups.values()]
        weights, _ = nnls(np.stack(columns, axis=1), wanted)
        return frozenset(name for name, weight in zip(groups, weights, strict=True) if weight > 0.5)

    def _descended(self, groups: _Groups, missing: frozenset[str]) -> tuple[Fit, frozenset[str]]:
        """They do not quite add up: switch one more group on or off, as long as that comes nearer."""
        fit = self._fit(self._live.score(State(off=_union(groups, missing))))
        for _ in range(_FLIPS if len(groups) <= _MANY else 0):
            others = [missing ^ {name} for name in groups]
            fits = [self._fit(self._live.score(State(off=_union(groups, other)))) for other in others]
            best = min(range(len(fits)), key=lambda i: fits[i].part)
            if fits[best].part >= fit.part:
                break
            fit, missing = fits[best], others[best]
        return fit, missing

    # --- neither ----------------------------------------------------------------------------

    def _unexplained(self) -> ServedFact:
        found = self._found
        if found.correlation >= _RELATED:
            return replace(self._fact, verdict="lossy")
        if found.half_width > _DECIDED and found.served_effect < CLOSE * found.effect:
            return replace(self._fact, verdict="undecidable", needed=tokens_needed(found))
        return replace(self._fact, verdict="lossy" if self._fact.merged else "other-adapter")


def _groupings(names: Sequence[str]) -> Iterator[_Groups]:
    """Layers by kind, by their number in the model, and each alone."""
    for key in (_kind, _number):
        groups: dict[str, set[int]] = {}
        for i, name in enumerate(names):
            groups.setdefault(key(name), set()).add(i)
        if len(groups) > 1:
            yield {name: frozenset(group) for name, group in groups.items()}
    if 1 < len(names) <= _ALONE:
        yield {name: frozenset([i]) for i, name in enumerate(names)}


def _kind(name: str) -> str:
    return f"every {name.rpartition('.')[2]}"


def _number(name: str) -> str:
    found = re.search(r"(\w+\.\d+)\.", name)
    return f"all of {found[1]}" if found else "what is in no numbered layer"


def _union(groups: _Groups, chosen: frozenset[str]) -> frozenset[int]:
    return frozenset[int]().union(*(groups[name] for name in chosen))


def _in_words(groups: _Groups, chosen: frozenset[str]) -> str:
    named = [name for name in groups if name in chosen]
    return ", ".join(named[:6]) + (f" and {len(named) - 6} more" if len(named) > 6 else "")
