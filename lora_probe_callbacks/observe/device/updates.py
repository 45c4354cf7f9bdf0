"""What a step did to the adapter tensors, and what it should not have touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lora_probe_callbacks.facts import Bools, Floats, Ints, Update
from lora_probe_callbacks.observe.device.batching import Held
from lora_probe_callbacks.observe.device.positions import PositionReading, read_position
from lora_probe_callbacks.observe.device.transfer import Readout, batches, kind, local

__all__ = ["CopiesBefore", "Fingerprints", "UpdateReading", "copy_before", "read_update", "update_of"]


@dataclass(eq=False, slots=True)
class CopiesBefore:
    """What an optimizer is about to change, as it is before its step: small tensors of one shape in one."""

    held: Held
    rows: list[torch.Tensor]  # one tensor a group
    readout: Readout
    norms: range  # of the slots, in ``readout``, which may travel before that of the update


@dataclass(eq=False, slots=True)
class UpdateReading:
    """An update on its way to the host."""

    step: int
    framework_step: int
    slots: Ints
    there: Bools | slice  # of these, those whose tensor has not left, and is of its kind
    counts: Floats
    starts: Callable[[], Floats]  # norms before the step
    norm: range
    size: range
    moved: range
    position: PositionReading  # where the step has led


def update_of(
    readings: Sequence[UpdateReading], received: Sequence[Callable[[Floats, Bools], None]], readout: Readout, size: int
) -> Update | None:
    """Put the readings of one step together, once the readout was received.

    Args:
        readings: One an optimizer.
        received: What enters the norms of the gradients that it got into a column, and which there were into a mask.
        readout: Received.
        size: Number of slots.

    Returns:
        The columns; None if no optimizer has stepped.
    """
    if not readings:
        return None
    stepped, there_was = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
    start, change, norm, fraction, gradient = (np.full(size, np.nan) for _ in range(5))
    for reading, enter in zip(readings, received, strict=True):
        there, slots = reading.there, reading.slots[reading.there]
        stepped[slots] = True
        start[slots] = reading.starts()[there]
        change[slots] = readout.get(reading.size)[there]
        norm[slots] = readout.get(reading.norm)[there]
        fraction[slots] = readout.get(reading.moved)[there] / reading.counts[there]
        enter(gradient, there_was)
    gradient[~stepped] = np.nan
    return Update(
        readings[0].step,
        readings[0].framework_step,
        stepped,
        start,
        change,
        norm,
        fraction,
        there_was & stepped,
        gradient,
    )


def copy_before(held: Held, readout: Readout) -> CopiesBefore:
    """One copy of the adapter, taken before the step; it lives until the step has ended.

    Args:
        held: The slots.
        readout: Where the norms of the copies travel.

    Returns:
        The copies.
    """
    rows = [part if part.shape[0] > 1 else part.clone() for part in held.rows()]
    return CopiesBefore(held, rows, readout, readout.add_row_norms(rows, 2))


def read_update(
    before: CopiesBefore, tensors: Mapping[int, torch.Tensor], readout: Readout, step: int, framework_step: int
) -> UpdateReading | None:
    """Compare the tensors with their copies, in place of the copies.

    Args:
        before: The copies; their values are overwritten.
        tensors: Slot to the tensor after the step.
        readout: Where the values travel.
        step: The step that was made.
        framework_step: Its number in the framework.

    Returns:
        A reading that yields facts after ``readout.receive()``, or None if there is nothing to compare.
    """
    held = before.held
    kinds = held.grouping.kinds
    found = list(map(tensors.get, held.slots.tolist()))
    now = found if held.plain else [t if t is None else local(t) for t in found]
    there: Bools | slice = slice(None)  # as a rule, all
    if any(t is None for t in now) or [kind(t) for t in now if t is not None] != kinds:
        there = np.array([t is not None and kind(t) == then for t, then in zip(now, kinds, strict=True)], np.bool_)
        copies = [copy for part in before.rows for copy in part.unbind()]
        now = [t if same else c.view(k[-1]) for t, same, c, k in zip(now, there, copies, kinds, strict=True)]
    if not held.slots[there].size:
        return None
    rows = batches(now, held.grouping)  # type: ignore[arg-type]
    norm = readout.add_row_norms(rows, 2)
    position = read_position(held.slots, there, rows, norm, readout, step=step, after=True)
    torch._foreach_sub_(before.rows, rows)
    size = readout.add_row_norms(before.rows, 2)
    # A difference is zero exactly where the bits agree, but for what is not finite: inf - inf is nan.
    moved = readout.add_row_counts(before.rows)
    ahead, ticket = before.readout, before.norms
    return UpdateReading(
        step=step,
        framework_step=framework_step,
        slots=held.slots,
        there=there,
        counts=held.sizes,
        starts=lambda: ahead.get(ticket),
        norm=norm,
        size=size,
        moved=moved,
        position=position,
    )


class Fingerprints:
    """Two norms of each tensor that must stay as it is; equal bits give equal norms."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self._last: Sequence[float] | None = None

    @property
    def size(self) -> int:
        """How many values a reading has."""
        return 2 * sum(t.is_floating_point() for t in self._tensors.values())

    def read(self, readout: Readout) -> range:
        """Put the present norms into ``readout``."""
        values = [local(t) for t in self._tensors.values() if t.is_floating_point()]
        first, second = readout.add_norms(values, 1), readout.add_norms(values, 2)
        return range(first.start, second.stop)

    def changed(self, values: Sequence[float] | Floats) -> tuple[str, ...]:
        """Names of the tensors whose norms differ from the last reading."""
        values = [float(v) for v in values]
        last, self._last = self._last, values
        if last is None:
            return ()
        names = [name for name, t in self._tensors.items() if t.is_floating_point()]
        half = len(names)
        return tuple(name for i, name in enumerate(names) if last[i] != values[i] or last[i + half] != values[i + half])
