"""When to look: which steps are probed, and what is looked at more rarely than that."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["ALWAYS", "Cadence"]

ALWAYS = 4  # the first steps are always probed: most faults are there from the start
_WARM_UP = 16  # and as many more, up to this one, as it takes until every claim is proven
_REPEATS_EVERY = 16  # after them, one probed step in so many runs a forward a second time
_FIRST_TOUCHES = 2
_OFTEN = 16  # a user who looks that often does not mind what it costs
_CLOSELY_EVERY = 16  # and after so many steps the graph is walked although gradients show that it is whole


class Cadence:
    """Which steps are probed.

    Args:
        every_n_steps: The cadence after the first steps.
        alone: One process: nobody else must come to the same answer.
        borrows: Whether the estimator waits for the inputs of a step's forward.
        proven: Whether everything has been proven that applies.
        unstepped: Whether no optimizer that owns the adapter has stepped so far, or it has stopped stepping.
    """

    def __init__(
        self,
        every_n_steps: int,
        *,
        alone: Callable[[], bool],
        borrows: Callable[[int], bool],
        proven: Callable[[], bool],
        unstepped: Callable[[], bool],
    ) -> None:
        self._every = every_n_steps
        self._alone = alone
        self._borrows = borrows
        self._proven = proven
        self._unstepped = unstepped
        self._last_closely = 0
        self._now: tuple[int, bool] = (-1, False)
        self._began = 0  # the step in which what trains has changed last
        self.probed_steps = 0  # so far

    def probed(self, step: int) -> bool:
        """Whether a step is probed; the answer stays while the step lasts.

        Args:
            step: Its number in this session.

        Returns:
            The same on all ranks, as it follows from numbers alone where there are several.
        """
        if self._now[0] != step:
            self._now = step, self._is_probed(step)
        return self._now[1]

    def _is_probed(self, step: int) -> bool:
        if step < ALWAYS or step % self._every == 0 or self._borrows(step):
            return True
        return self._alone() and (self._unstepped() or (step - self._began < _WARM_UP and not self._proven()))

    def newly_probed(self, step: int) -> bool:
        """The present step takes too long: whether it is probed from here on, and was not before."""
        before, self._now = self._now, (step, self._is_probed(step))
        return self._now[1] and before != self._now

    def begin_again(self, step: int) -> None:
        """What trains has changed: look at the next steps until everything is proven."""
        self._began = step

    def precedes(self, step: int) -> bool:
        """The step after this one is probed by its number: what happens between the two shall be seen."""
        return (step + 1) % self._every == 0

    def closely(self, step: int) -> bool:
        """Walk the graph of this step's forwards, whether or not gradients show that it is whole."""
        due = step < ALWAYS or step - self._last_closely >= _CLOSELY_EVERY
        if due:
            self._last_closely = step
        return due

    def repeats(self, step: int) -> bool:
        """Run a forward of this step a second time."""
        return step < ALWAYS or self._is_rare()

    def touches(self, step: int, *, begun: int, complete: bool, doubt: bool) -> bool:
        """Measure a part of the gradient in this step, by two forwards.

        That is done in the first two steps, and then until each tensor was measured: at every second probed step of
        a cadence that costs little, and at each of one that looks often. Then rarely.

        Args:
            step: Its number.
            begun: Measurements up to now.
            complete: Each tensor was measured.
            doubt: The last one found something wrong.

        Returns:
            The same on all ranks, as it follows from numbers alone.
        """
        if begun < _FIRST_TOUCHES or doubt:
            return step < ALWAYS or self._regular(step) or begun > 0
        if complete:
            return self._is_rare()
        return self._regular(step)

    def _regular(self, step: int) -> bool:
        """A step of the cadence itself."""
        gap = self._every if self._every <= _OFTEN else 2 * self._every
        return step % gap == 0

    def _is_rare(self) -> bool:
        return self.probed_steps % _REPEATS_EVERY == _REPEATS_EVERY - 1
