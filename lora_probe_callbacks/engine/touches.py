"""Which part of the adapter is moved next, so that after a while each tensor's gradient has been measured by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lora_probe_callbacks.checks.reachability.wrong_gradient import STEPS, cleared, is_bad
from lora_probe_callbacks.facts import Bools, Ints, StepResponse

__all__ = ["Touches"]

_WHOLE = 2  # the first touches move all of it: what is wrong everywhere is wrong by most there
_PARTS = 14  # and so many parts follow, in turn
_KEPT = 32
_LOSS, _LOSS_EVERY = (1, 2), 8
_TRIES = 2  # of a part that cannot be told from rounding, before it is left for a while
_STEPS = 3  # in which what was wrong once is looked at again
_DOUBTS = 1  # touches of healthy runs in 16 bits that may cost more than two forwards, at first
_DOUBTS_EVERY = 4  # and one of so many later


class Touches:
    """What was measured of each tensor up to now.

    Args:
        roles: Of each slot.
        expected: Slots that should be measured.
    """

    def __init__(self, roles: Sequence[str], expected: Bools) -> None:
        self._roles = roles
        self._expected = expected
        self._tried: Ints = np.zeros(len(roles), np.int64)  # how often each has been moved with others of its part
        self._always_zero = np.ones(len(roles), np.bool_)  # its gradient was exactly zero at every touch
        self._doubts = 0
        self.number = 0
        self.measured: Ints = np.full(len(roles), -1)  # the last step at which it was measured and right
        self.responses: tuple[StepResponse, ...] = ()

    def __len__(self) -> int:
        return len(self._roles)

    @property
    def complete(self) -> bool:
        """Each tensor has been measured, or been tried as often as is worth its while."""
        done = (self.measured >= 0) | (self._tried >= _TRIES) | ~self._expected
        return self.number > _WHOLE and (bool(done.all()) or self.number >= _WHOLE + _TRIES * _PARTS)

    @property
    def in_doubt(self) -> bool:
        """A touch found something wrong, and none since has cleared it: look at the same again, soon."""
        return self._suspect is not None

    @property
    def _suspect(self) -> StepResponse | None:
        for response in reversed(self.responses[-_STEPS:]):
            if cleared(response):
                return None
            if is_bad(response):
                alike = (r for r in self.responses if is_bad(r) and set(r.slots) & set(response.slots))
                return response if len(list(alike)) < STEPS else None  # else it is certain already
        return None

    @property
    def may_doubt(self) -> bool:
        """Touches that turn out to be in doubt may take more forwards to settle it."""
        return self._doubts < _DOUBTS + self.number // _DOUBTS_EVERY or self.in_doubt

    @property
    def asks_loss(self) -> bool:
        """Also ask whether the loss, where it is made outside the model, has a right backward: one forward more."""
        return self.number in _LOSS or (self.number > 0 and self.number % _LOSS_EVERY == 0)

    @property
    def bends(self) -> list[float]:
        """How far from one line the loss was found, where it was."""
        return [r.bend for r in self.responses if r.bend is not None]

    def choose(self, there: Sequence[int], zero: Sequence[int]) -> list[int]:
        """Say which tensors to move.

        Args:
            there: Those with a gradient.
            zero: Those whose gradient is exactly zero.

        Returns:
            Some of the former, or some of the latter.
        """
        self._always_zero[list(there)] = False
        if (suspect := self._suspect) is not None:
            last = set(suspect.slots)
            if again := [i for i in (*there, *zero) if i in last]:
                return [i for i in again if i in set(there)] or again
        if self.number < _WHOLE:
            return list(there)
        dead = [i for i in zero if self._always_zero[i] and self._roles[i] != "A"]
        if dead and (self._tried[dead] == 0).any():
            return dead
        part = math.ceil(len(self) / _PARTS)
        order = sorted(
            there, key=lambda i: (self.measured[i], self._tried[i], self._roles[i] == "A", self._roles[i], i)
        )
        return [i for i in order if self._roles[i] == self._roles[order[0]]][:part]

    def enter(self, response: StepResponse, *, cost_more: bool) -> None:
        """Add what was measured.

        Args:
            response: The measurement.
            cost_more: It took more than the two forwards that it takes at least.
        """
        if self.number >= _WHOLE:
            self._tried[list(response.slots)] += 1
            if cleared(response):
                self.measured[list(response.slots)] = response.step
        self.number += response.why_not is None
        self._doubts += cost_more
        self.responses = (*self.responses, response)[-_KEPT:]
