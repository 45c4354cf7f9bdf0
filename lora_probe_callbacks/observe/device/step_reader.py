"""What is read from the device around one step, and its one way to the host.

A decision needs the gradients of its own step and what the update before it did. Both are put into
one readout as small tensors, and fetched together when the decision is made.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch.optim import Optimizer

from lora_probe_callbacks.facts import (
    SAMPLE,
    Bools,
    DeviceFacts,
    Floats,
    Gradients,
    Ints,
    Role,
    Sample,
    SupervisionFacts,
    Update,
    When,
)
from lora_probe_callbacks.observe.device.base_drift import BaseSample
from lora_probe_callbacks.observe.device.frozen_state import FrozenState
from lora_probe_callbacks.observe.device.gradients import GradientReading, gradients_of, read_gradients
from lora_probe_callbacks.observe.device.positions import PositionReading, read_position
from lora_probe_callbacks.observe.device.rank_sample import rank_sample
from lora_probe_callbacks.observe.device.token_rows import TokenRows
from lora_probe_callbacks.observe.device.transfer import Readout, local
from lora_probe_callbacks.observe.device.updates import CopiesBefore, UpdateReading, copy_before, read_update, update_of
from lora_probe_callbacks.observe.forward.supervision import SupervisionObserver
from lora_probe_callbacks.observe.model.others import OtherAdapters
from lora_probe_callbacks.observe.model.owners import Owners
from lora_probe_callbacks.observe.model.ownership import found_inf, grad_scale, tensors_of
from lora_probe_callbacks.observe.model.targets import Targets

__all__ = ["DeviceReader", "Readings"]


@dataclass(frozen=True, slots=True)
class Readings:
    """What came to the host for one decision.

    Attributes:
        facts: What a check may know of it.
        supervision: The tokens that the loss is made of.
        skipped_inside: Whether a fused optimizer left the update out by itself; None where it was not asked to decide.
        counts: Single numbers of others that travelled along.
        tensor_sample: Of what every rank should hold alike, if it was asked for.
        gradient_sample: The same of the gradients.
    """

    facts: DeviceFacts
    supervision: SupervisionFacts
    skipped_inside: bool | None
    counts: list[float]
    tensor_sample: Sample
    gradient_sample: Sample


@dataclass(eq=False, slots=True)
class _Tickets:
    """Where the values of one decision will be found."""

    readout: Readout = field(default_factory=Readout)
    updates: list[UpdateReading] = field(default_factory=list)
    # gradients as the optimizer got them, or what is known of them already
    received: list[GradientReading | Gradients] = field(default_factory=list)
    gradients: list[GradientReading] = field(default_factory=list)
    before: range | None = None
    after: range | None = None
    skipped: range | None = None
    rows: list[tuple[TokenRows, range, range, int, int]] = field(default_factory=list)
    tensor_sample: range | None = None
    gradient_sample: range | None = None
    drift: range | None = None
    frozen: range | None = None
    followers: range | None = None
    copies: range | None = None
    arrived: list[range] = field(default_factory=list)
    positions: list[PositionReading] = field(default_factory=list)
    counts: list[range] = field(default_factory=list)


class DeviceReader:
    """Reads tensors around the optimizer's step.

    Args:
        targets: What is expected to train.
        owners: Who owns it.
        others: The adapters beside it.
    """

    def __init__(self, targets: Targets, owners: Owners, others: OtherAdapters) -> None:
        self._targets = targets
        self._owners = owners
        self._others = others
        self._sample = BaseSample(targets.layers)
        self.frozen_state = FrozenState(targets)
        self._tickets = self._sent = _Tickets()
        self.token_rows: list[TokenRows] = []
        self.supervision: SupervisionObserver | None = None
        self._copies: dict[int, CopiesBefore] = {}  # by optimizer
        self._final: dict[int, Gradients] = {}  # those that nothing can change before the update
        self._scaled: dict[int, GradientReading] = {}  # of fused optimizers, which unscale them in place
        self._looked_after: set[int] = set()  # optimizers whose last step was looked at when it had ended

    @property
    def waiting(self) -> bool:
        """Something was read that no decision has judged yet."""
        tickets = self._tickets
        return bool(tickets.updates or tickets.gradients or tickets.positions) or tickets.after is not None

    def forget_readings(self) -> None:
        """What was read is of slots that are no longer numbered like this."""
        self._tickets = _Tickets()
        self.forget()

    def forget(self) -> None:
        """Let go of all copies."""
        self._copies.clear()
        self._final.clear()
        self._scaled.clear()

    @torch.no_grad()
    def copy(self, optimizer: int, step: int) -> None:
        """Copy what an optimizer is about to change; the copies live until its step has ended."""
        if optimizer not in self._copies:
            copies = self._copies[optimizer] = copy_before(self._owners.held(optimizer), self._tickets.readout)
            self._stand(optimizer, copies.held.slots, copies.rows, copies.norms, step, after=False)

    @torch.no_grad()
    def read_position(self, optimizer: int, step: int, *, after: bool) -> None:
        """Where its tensors stand beside a step that is not probed: is that where the last look has left them?"""
        if not after and optimizer not in self._looked_after:
            return
        held, readout = self._owners.held(optimizer), self._tickets.readout
        rows = held.rows()
        self._stand(optimizer, held.slots, rows, readout.add_row_norms(rows, 2), step, after=after)

    def _stand(
        self, optimizer: int, slots: Ints, rows: Sequence[torch.Tensor], norm: range, step: int, *, after: bool
    ) -> None:
        next_step = optimizer in self._looked_after
        readout = self._tickets.readout
        reading = read_position(slots, slice(None), rows, norm, readout, step=step, after=after, next_step=next_step)
        self._tickets.positions.append(reading)
        if after:
            self._looked_after.add(optimizer)

    def stepped(self, optimizer: int) -> None:
        """An optimizer has made a step that nobody may have looked at."""
        self._looked_after.discard(optimizer)

    @torch.no_grad()
    def read_others_before(self) -> None:
        """Fingerprint the adapters that must stay as they are, before the step."""
        if self._tickets.before is None:
            self._tickets.before = self._others.read(self._tickets.readout)

    @torch.no_grad()
    def read_gradients(self, optimizer: int, *, unowned: bool) -> None:
        """Read the gradients that an optimizer is about to apply."""
        held = self._owners.held(optimizer, unowned=unowned)
        scale = grad_scale(self._targets.optimizers[optimizer])
        self._tickets.gradients.append(read_gradients(held, self._tickets.readout, scale))

    @torch.no_grad()
    def read_scaled(self, optimizer: int) -> None:
        """Directly before the step of a fused optimizer under a scaler: its kernel writes over the gradients."""
        scale = grad_scale(self._targets.optimizers[optimizer])
        if scale is not None and optimizer not in self._final:
            self._scaled[optimizer] = read_gradients(self._owners.held(optimizer), self._tickets.readout, scale)

    @torch.no_grad()
    def read_samples(self, optimizer: int | None) -> None:
        """Sample what every rank should hold alike, and its gradients if an optimizer is about to apply them."""
        owners, tickets = self._owners, self._tickets
        tickets.tensor_sample = self._sampled(owners.whole())
        if optimizer is not None:
            mine = owners.of_optimizer(optimizer, unowned=True)
            grads = {i: t.grad for i, t in owners.whole().items() if i in mine and t.grad is not None}
            tickets.gradient_sample = self._sampled({i: g for i, g in grads.items() if not g.is_sparse})

    def _sampled(self, tensors: dict[int, torch.Tensor]) -> range:
        by_role: dict[Role, list[torch.Tensor]] = {"A": [], "B": [], "other": []}
        for index, tensor in tensors.items():
            by_role[self._targets.slots[index].role].append(local(tensor))
        return self._tickets.readout.add(rank_sample(list(by_role.values()), self._targets.device))

    @torch.no_grad()
    def read_after(self, optimizer: int, step: int, framework_step: int) -> None:
        """Directly after a step: what did it change, and what were the gradients that it got?"""
        copies = self._copies.pop(optimizer, None)
        self._owners.forget_kinds()
        known, scaled = self._final.pop(optimizer, None), self._scaled.pop(optimizer, None)
        if copies is None:
            return
        tickets, inner = self._tickets, self._targets.optimizers[optimizer]
        mine = self._owners.of_optimizer(optimizer)
        update = read_update(copies, mine, tickets.readout, step, framework_step)
        if update is not None:
            tickets.updates.append(update)
            tickets.positions.append(update.position)
            self._looked_after.add(optimizer)
            received = scaled if known is None else known
            if received is None:
                received = read_gradients(self._owners.held(optimizer), tickets.readout, None)
            tickets.received.append(received)
        self._read_rows(inner, step, framework_step)
        tickets.skipped = _flag(inner, tickets.readout)
        tickets.after = self._others.read(tickets.readout)

    def _read_rows(self, optimizer: Optimizer, step: int, framework_step: int) -> None:
        """What came to the rows of new tokens, where this optimizer owns them."""
        owned = {id(t) for t in tensors_of([optimizer])} if self.token_rows else set()
        for rows in self.token_rows:
            if owned.isdisjoint(map(id, rows.tensors)):
                continue
            found = rows.read(self._tickets.readout)
            if found is not None:
                self._tickets.rows.append((rows, *found, step, framework_step))

    @torch.no_grad()
    def send(self, *, cotangents: list[torch.Tensor], counts: list[torch.Tensor], sample: bool, closely: bool) -> None:
        """Gather on the device what a decision needs; the device may still be busy with the backward.

        Args:
            cotangents: Gradients of one element that arrived at outputs.
            counts: Single numbers of others that travel along.
            sample: Look at the sampled base weights too.
            closely: And at what else is frozen.
        """
        self._sent, self._tickets = self._tickets, _Tickets()
        sent, readout = self._sent, self._sent.readout
        sent.drift = self._sample.read(readout) if sample else None
        sent.frozen = self.frozen_state.read(readout) if sample and closely else None
        sent.followers = self._others.followers.read(readout) if sample else None
        sent.copies = self._owners.copies.read(readout) if sample and self._owners.copies is not None else None
        sent.arrived = [readout.add(c.reshape(1)) for c in cotangents]
        if self.supervision is not None:
            self.supervision.send(readout)
        sent.counts = [readout.add(c.reshape(1)) for c in counts]
        readout.send()

    def receive(self, when: When, *, final: bool, merges: int, active: Set[str]) -> Readings:
        """Bring what was sent to the host: the one transfer of a decision, and its one wait for the device.

        Args:
            when: The decision; its optimizer is the one whose gradients were read for it.
            final: Nothing can change these between this reading and the update.
            merges: Times that a layer was seen merged.
            active: Names of the adapters that were active in some forward.

        Returns:
            What was read since the last time.
        """
        tickets, readout = self._sent, self._sent.readout
        readout.receive()
        for rows, came, sizes, step, framework_step in tickets.rows:
            rows.advance(readout.get(came), readout.get(sizes), step, framework_step)
        size = len(self._targets.slots)
        gradients = gradients_of(tickets.gradients, readout, size)
        if final and when.optimizer is not None:
            self._final[when.optimizer] = gradients
        skipped = None if tickets.skipped is None else bool(readout.get(tickets.skipped)[0] > 0)
        update = None if skipped else self._update(tickets, size)
        self._advance(tickets, update, when.step)
        samples = [
            (0.0,) * SAMPLE if ticket is None else tuple(readout.get(ticket).tolist())
            for ticket in (tickets.tensor_sample, tickets.gradient_sample)
        ]
        before, after = (None if t is None else readout.get(t) for t in (tickets.before, tickets.after))
        hopeless = any(not np.isfinite(readout.get(ticket)).all() for ticket in tickets.arrived)
        facts = DeviceFacts(
            gradients=gradients,
            gradients_final=final,
            no_gradient_at_all=when.moment in ("step", "waiting") and self._nothing_anywhere(gradients),
            all_non_finite=hopeless or bool(gradients.present.any() and not np.isfinite(gradients.norm).any()),
            update=update,
            gathering=update is not None and self._gathers(update),
            others=self._others.facts(before, after, active, self._owners),
            base_drift=None if tickets.drift is None else self._sample.fact(readout.get(tickets.drift), merges),
            copies=self._owners.copies_fact(),
            token_rows=tuple(rows.fact() for rows in self.token_rows),
            unsaved=self.frozen_state.moved,
            looks=tuple(position.look(size) for position in tickets.positions),
            base_moved=None if tickets.drift is None else self._sample.moved(readout.get(tickets.drift)),
        )
        supervision = SupervisionFacts() if self.supervision is None else self.supervision.fact(readout)
        counts = [float(readout.get(ticket)[0]) for ticket in tickets.counts]
        return Readings(facts, supervision, skipped, counts, samples[0], samples[1])

    @torch.no_grad()
    def _gathers(self, update: Update) -> bool:
        """Whether the optimizer has kept something of gradients by which it has moved nothing."""
        # One tensor tells, and it is looked at only where nothing moved: this is a transfer of its own.
        still = np.flatnonzero(update.stepped & (update.gradient_norm > 0.0) & ~update.moved).tolist()
        tensor = self._owners.tensors[still[0]] if still and not update.moved.any() else None
        if tensor is None:
            return False
        kept = [v for o in self._targets.optimizers for v in o.state.get(tensor, {}).values() if _like(v, tensor)]
        # A copy of the tensor, as schedule-free optimizers keep, says nothing of gradients.
        return any(bool(local(v).any()) and not torch.equal(local(v), local(tensor)) for v in kept)

    def _nothing_anywhere(self, gradients: Gradients) -> bool:
        optimizers = range(len(self._targets.optimizers))
        return not gradients.present.any() and not any(map(self._owners.has_gradients, optimizers))

    def _advance(self, tickets: _Tickets, update: Update | None, step: int) -> None:
        """What is counted from decision to decision."""
        readout, copies = tickets.readout, self._owners.copies
        if tickets.frozen is not None:
            self.frozen_state.advance(readout.get(tickets.frozen))
        if tickets.followers is not None:
            moved = update is not None and bool(update.moved.any())
            self._others.followers.advance(readout.get(tickets.followers), step, moved=moved)
        if tickets.copies is not None and copies is not None:
            copies.advance(readout.get(tickets.copies))

    def _update(self, tickets: _Tickets, size: int) -> Update | None:
        enter = [partial(_enter, received, tickets.readout) for received in tickets.received]
        return update_of(tickets.updates, enter, tickets.readout, size)


def _enter(received: GradientReading | Gradients, readout: Readout, column: Floats, present: Bools) -> None:
    """Norms of the gradients that one optimizer got, into the column of all, and which there were."""
    if isinstance(received, GradientReading):
        received.norms(readout, column)
        present[received.slots] = False
        present[received.present] = True
    else:
        column[received.present] = received.norm[received.present]
        present |= received.present


def _like(value: object, tensor: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == tensor.shape


def _flag(optimizer: Optimizer, readout: Readout) -> range | None:
    flag = found_inf(optimizer)
    return None if flag is None else readout.add(flag.reshape(1))
