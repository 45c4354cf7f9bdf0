"""What keeps a claim from being proven, in words, the nearest cause first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lora_probe_callbacks.facts import Bools, Facts, Ints
from lora_probe_callbacks.facts.proof import Claim

__all__ = ["PATIENCE", "Column", "Gap"]

PATIENCE = 16  # probed steps in which it could have been renewed


@dataclass(eq=False, slots=True)
class Column:
    """What is known of one claim, one entry a slot."""

    last: Ints  # the step at which it was observed last, -1 if it never was
    missed: Ints  # in a row up to now: it could have been renewed, and was not
    rested: Ints  # the longest such row after which it came back

    @classmethod
    def of(cls, size: int) -> Column:
        """Of so many slots, nothing observed."""
        return cls(np.full(size, -1), np.zeros(size, np.int64), np.zeros(size, np.int64))

    def enter(self, seen: Bools, could: Bools, step: int) -> None:
        """Add a step in which it was ``seen``, or ``could`` have been."""
        self.rested = np.where(seen, np.maximum(self.rested, self.missed), self.rested)
        self.last = np.where(seen, step, self.last)
        self.missed = np.where(seen, 0, self.missed + could)

    @property
    def holds(self) -> Bools:
        """It was observed, and not too long ago."""
        return (self.last >= 0) & ~self.stale

    @property
    def stale(self) -> Bools:
        """It was not renewed for too long."""
        over: Bools = self.missed >= np.maximum(PATIENCE, 2 * self.rested)
        return over


@dataclass(frozen=True, eq=False, slots=True)
class Gap:
    """One claim that is not proven for every tensor.

    Attributes:
        claim: Which.
        facts: Of the last decision.
        columns: What is known of every claim, an entry a slot.
        ran_at: The last step in which each slot's layer ran in a training forward, -1 if it never did.
        blamed: Code of the check that spoke of each slot last.
        lapsed: Slots whose optimizer steps no more.
        stale: The last repeated forward went on with old values.
        somebody_ran: Some training forward was seen.
        nothing_ran: What is to be said if none was.
        ended: The run is over.
    """

    claim: Claim
    facts: Facts
    columns: Mapping[Claim, Column]
    ran_at: Ints
    blamed: np.ndarray[tuple[int], np.dtype[np.str_]]
    lapsed: Bools
    stale: bool
    somebody_ran: bool
    nothing_ran: str
    ended: bool

    def why(self, missing: Bools, expected: Bools) -> str:
        """The reasons, the one of most tensors first.

        Args:
            missing: Slots for which it is not proven.
            expected: Slots that must train.

        Returns:
            One line.
        """
        whole = self._of_all(missing)
        if whole is not None:
            return whole
        if not missing.any():  # and nothing is expected either
            return "every tensor that should train is idle" if expected.any() else "no tensor is meant to train"
        left, parts = missing.copy(), []
        for holds, reason in self._reasons():
            mine = left & holds()
            if mine.any():
                parts.append((int(mine.sum()), reason + self._diagnosis(mine)))
                left &= ~mine
        parts.sort(key=lambda part: -part[0])
        return "; ".join(f"{count} {reason}" for count, reason in parts)

    def _of_all(self, missing: Bools) -> str | None:
        """A reason that does not differ from tensor to tensor."""
        facts = self.facts
        if not len(facts.slots):
            return "no step was judged"
        if self.claim == "gradient":
            last = facts.responses[-1].why_not if facts.responses else None
            return last or "measured a part at a time, against a finite difference of the loss"
        if self.claim == "served":
            return f"the sampler was another policy than the one that trains{self._diagnosis(missing)}"
        if self.claim == "agreed":
            return facts.why_alone or "the ranks did not hold, or did not apply, the same at the last exchange"
        if facts.why_not_owned and self.claim in ("owned", "reached", "moved", "seen"):
            return facts.why_not_owned
        return None if self.somebody_ran else facts.unobservable or self.nothing_ran

    def _reasons(self) -> list[tuple[Callable[[], Bools], str]]:
        """What keeps a tensor from being proven."""
        facts, columns, claim = self.facts, self.columns, self.claim
        history, slots = facts.history, facts.slots
        size = len(self.ran_at)
        never = np.full(size, claim in ("moved", "seen"))
        reasons: list[tuple[Callable[[], Bools], str]] = [
            (lambda: ~slots.requires_grad, "frozen (requires_grad=False)"),
            (lambda: self.ran_at < 0, "not reached by a training forward so far"),
        ]
        if claim == "active":
            return [*reasons, (lambda: ~columns["active"].holds, "in layers that ran without the adapter")]
        if claim == "supervised":
            return [*reasons, (lambda: ~columns["supervised"].holds, "in forwards of which no token is supervised")]
        reasons += [(lambda: ~slots.owned, "in no optimizer")]
        if claim == "owned":
            return reasons
        return [
            *reasons,
            (lambda: _of_idle_optimizers(facts) | (history.reads == 0), "whose optimizer has not stepped"),
            (lambda: never & self.lapsed, "whose optimizer steps no more, although backward passes go on"),
            (lambda: history.missing > 0, "without a gradient (None)"),
            (lambda: (history.zero > 0) & ~history.had_signal, "with a gradient of exactly zero so far"),
            (lambda: history.zero > 0, "with a gradient of exactly zero"),
            (lambda: never & (history.rate_zero > 0), "with a learning rate of 0"),
            (lambda: never & (history.put_back > 0), "put back after each step"),
            (lambda: never & (facts.skipped_in_a_row > 0), "whose steps were skipped"),
            (lambda: never & (columns["moved"].last < 0), "that no step has moved so far"),
            (lambda: never & ~columns["moved"].holds, "that no step moves any more"),
            (lambda: never & self.stale, "whose forward went on with old values"),
            (lambda: never, "with no training forward since they moved"),
            (lambda: columns[claim].stale, "not observed any more"),
            (lambda: np.ones(size, np.bool_), "not observed so far"),
        ]

    def _diagnosis(self, slots: Bools) -> str:
        codes = sorted({code for code in self.blamed[slots].tolist() if code})
        if codes:
            return f" ({', '.join(codes)})"
        if int(self.columns[self.claim].missed[slots].max()) >= PATIENCE:
            return " (no check explains this)"
        return ", and the run has ended" if self.ended else " (not yet)"


def _of_idle_optimizers(facts: Facts) -> Bools:
    steps = facts.steps_of
    idle = [number for number, made in enumerate(steps) if not made and max(steps) > 1]
    found: Bools = np.isin(facts.slots.owner, idle)
    return found
