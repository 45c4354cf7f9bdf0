"""What becomes of gradients between the backward passes of one step, and between steps.

Accumulation is an agreement: what one backward leaves in ``.grad`` is still there when the next one begins, and
nothing of an earlier step is. Both are looked at where a backward begins (a loop may clear gradients between forward
and backward) and where it ends. Who holds which gradient, and how often it was written, is known to the host; values
are only needed where that has changed, and travel with everything else.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from lora_probe_callbacks._gc import no_collection
from lora_probe_callbacks.facts import Accumulation

__all__ = ["Arrivals"]

_SAMPLED, _ELEMENTS = 16, 1024  # tensors, and elements of each, whose direction is compared

# Of each slot, which gradient stands there and how often it was written: one number, as the collector counts tuples.
_Places = list[int | None]
_OBJECT = 32  # bits to the right of what tells the object


@dataclass(eq=False, slots=True)
class _Pass:
    """One backward pass that left something in ``.grad``.

    Attributes:
        places: The gradients when it ended.
        weights: How often the tensors themselves had been written by then.
        inputs: The tensors that its forward was given.
        left: How many gradients other than zero there were when the next one began, on the device; None if they were
            as it had left them.
        excused: The weights were moved in between (SAM): to begin anew has its reason.
    """

    places: _Places
    weights: int
    inputs: Sequence[weakref.ref[torch.Tensor]]
    left: torch.Tensor | None = None
    excused: bool = False


class Arrivals:
    """Follows ``.grad`` of the adapter's tensors through one step.

    Args:
        on_error: Called with an exception of our own, which must not reach the user's backward.
    """

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._on_error = on_error
        self._slots: Sequence[Callable[[], torch.Tensor | None]] = ()
        self._after_step: _Places = []
        self.begin()

    def begin(self) -> None:
        """A new step."""
        self._passes: list[_Pass] = []
        self._task = -1
        self._old: torch.Tensor | None = None  # how many gradients of an earlier step the first backward has added to
        self._old_ids: set[int] = set()
        self._sample: list[tuple[int, torch.Tensor]] = []

    def watch(self, slots: Sequence[Callable[[], torch.Tensor | None]]) -> None:
        """Say whose gradients are meant.

        Args:
            slots: Each returns the tensor that is registered in its place.
        """
        self._slots, self._after_step = slots, []
        self.begin()

    # --- as it happens ----------------------------------------------------------------------

    @torch.no_grad()
    def backward_begins(self, inputs: Sequence[weakref.ref[torch.Tensor]]) -> None:
        """The first gradient of a backward has come to the output of a forward; nothing is accumulated yet.

        Args:
            inputs: What the forward was given.
        """
        task = torch._C._current_graph_task_id()
        if task == self._task:  # two forwards, one backward
            return
        self._task = task
        with no_collection():
            self._look_before(inputs)

    def _look_before(self, inputs: Sequence[weakref.ref[torch.Tensor]]) -> None:
        tensors = [slot() for slot in self._slots]
        places = _places(tensors)
        old = None
        if self._passes:
            last = self._passes[-1]
            if places != last.places:
                last.left, last.excused = _not_zero(tensors), _written(tensors) != last.weights
        elif len(places) == len(self._after_step) and any(
            now is not None and now == then for now, then in zip(places, self._after_step, strict=True)
        ):
            old = _not_zero(tensors)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._backward_ends(places, old, inputs))

    def _backward_ends(
        self, before: _Places, old: torch.Tensor | None, inputs: Sequence[weakref.ref[torch.Tensor]]
    ) -> None:
        try:
            with no_collection(), torch.no_grad():
                tensors = [slot() for slot in self._slots]
                places = _places(tensors)
                if places == before:  # torch.autograd.grad leaves nothing there
                    return
                if old is not None:
                    self._old, self._old_ids = old, self._added_to(before, places)
                if any(one.left is not None for one in self._passes):
                    self._sample = _sampled(tensors)
                self._passes.append(_Pass(places, _written(tensors), inputs))
        except Exception as error:
            self._on_error(error)

    def _added_to(self, before: _Places, after: _Places) -> set[int]:
        """The gradients that were there as the last step had left them, and were added to."""
        rows = zip(before, self._after_step, after, strict=True)
        return {
            b >> _OBJECT for b, then, a in rows if b and b == then and a and a >> _OBJECT == b >> _OBJECT and a != b
        }

    def step_ended(self, applied: Collection[int]) -> None:
        """Optimizers have stepped: what is in ``.grad`` now belongs to the past.

        Args:
            applied: The slots whose gradients they have applied.
        """
        with no_collection():
            places = _places([slot() for slot in self._slots])
            self._after_step = [place if i in applied else None for i, place in enumerate(places)]

    # --- for the decision -------------------------------------------------------------------

    @torch.no_grad()
    def counts(self) -> list[torch.Tensor]:
        """What has to come from the device, one element each; see :meth:`fact`."""
        found = [one.left for one in self._passes if one.left is not None]
        return [*found, *([] if self._old is None else [self._old]), *self._direction()]

    def fact(self, values: Sequence[float]) -> Accumulation:
        """What was seen in this step.

        Args:
            values: Of :meth:`counts`.

        Returns:
            The fact.
        """
        values, lost, excused = list(values), 0, False
        for number, one in enumerate(self._passes, start=1):
            if one.left is not None and not values.pop(0):
                lost = number  # and what was accumulated before
                excused |= one.excused or _shares(one.inputs, self._passes[-1].inputs)
        places = _places([slot() for slot in self._slots])
        if not any(places):
            lost = len(self._passes)
        old = 0 if self._old is None else int(values.pop(0))
        if lost or not any(place and place >> _OBJECT in self._old_ids for place in places):
            old = 0  # cleared, or written anew, before the optimizer had them
        aligned = values[0] / (values[1] * values[2]) ** 0.5 if len(values) == 3 and values[1] * values[2] else None
        return Accumulation(passes=len(self._passes), lost=0 if excused else lost, old=old, aligned=aligned)

    def _direction(self) -> list[torch.Tensor]:
        """Products of what the last backward left with what is there now: a factor of clipping drops out."""
        pairs = []
        for index, then in self._sample:
            tensor = self._slots[index]()
            now = None if tensor is None or tensor.grad is None else _some(tensor.grad)
            if now is not None and now.shape == then.shape:
                pairs.append((then.double(), now.double()))
        if not pairs:
            return []
        then, now = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
        return [(then * now).sum(), then.square().sum(), now.square().sum()]


def _places(tensors: Iterable[torch.Tensor | None]) -> _Places:
    grads = [None if t is None else t.grad for t in tensors]
    return [None if g is None else id(g) << _OBJECT | g._version for g in grads]


def _written(tensors: Iterable[torch.Tensor | None]) -> int:
    return sum(t._version for t in tensors if t is not None)


def _gradients(tensors: Sequence[torch.Tensor | None]) -> list[tuple[int, torch.Tensor]]:
    grads = ((i, t.grad) for i, t in enumerate(tensors) if t is not None)
    return [(i, g) for i, g in grads if g is not None and not g.is_sparse]


def _not_zero(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """How many gradients have an element other than zero."""
    grads = [g for _, g in _gradients(tensors)]
    if not grads:
        return torch.zeros(())
    norms = torch._foreach_norm(grads, float("inf"))
    return torch.stack([n.to(norms[0].device, torch.float32) for n in norms]).ne(0).sum()


def _sampled(tensors: Sequence[torch.Tensor | None]) -> list[tuple[int, torch.Tensor]]:
    there = _gradients(tensors)
    return [(i, _some(g).clone()) for i, g in there[:: 1 + len(there) // _SAMPLED]]


def _some(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.detach().reshape(-1)[:_ELEMENTS]


def _shares(some: Sequence[weakref.ref[torch.Tensor]], others: Sequence[weakref.ref[torch.Tensor]]) -> bool:
    """Two forwards were given the same tensor: they are looks at one batch, not two of them."""
    mine = {id(t) for ref in some if (t := ref()) is not None}
    return any(id(t) in mine for ref in others if (t := ref()) is not None)
