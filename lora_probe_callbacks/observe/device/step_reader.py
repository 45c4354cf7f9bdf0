"""What is read from the device around one step, and its one way to the host.

A decision needs the gradients of its own step and what the update before it did. Both are put into
one readout as small tensors, and fetched together when the decision is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch.optim import Optimizer

from lora_probe_callbacks.distributed.transport import sample
from lora_probe_callbacks.facts import SAMPLE, BaseDrift, Floats, Gradients, Role, Sample, Update
from lora_probe_callbacks.observe.device.base_drift import BaseSample
from lora_probe_callbacks.observe.device.gradients import GradientReading, gradients_of, read_gradients
from lora_probe_callbacks.observe.device.token_rows import TokenRows
from lora_probe_callbacks.observe.device.transfer import Readout, local
from lora_probe_callbacks.observe.device.updates import CopiesBefore, UpdateReading, copy_before, read_update, update_of
from lora_probe_callbacks.observe.model.others import OtherAdapters
from lora_probe_callbacks.observe.model.owners import Owners
from lora_probe_callbacks.observe.model.ownership import found_inf, grad_scale, tensors_of
from lora_probe_callbacks.observe.model.targets import Targets

__all__ = ["DeviceReader", "Readings"]


@dataclass(frozen=True, slots=True)
class Readings:
    """What came to the host for one decision.

    Attributes:
        gradients: As the optimizer is about to receive them.
        update: The last probed update, or None.
        others_before: Fingerprints of the other adapters before that update.
        others_after: The same directly after it.
        drift: Of sampled base weights.
        skipped_inside: Whether a fused optimizer left the update out by itself; None where it was not asked to decide.
        all_non_finite: Nothing that arrived was finite: no change of the loss scale cures that.
        tensor_sample: Of what every rank should hold alike, if it was asked for.
        gradient_sample: The same of the gradients.
        followers: Sums of the bits of lagged adapters, if there are any.
        copies: Norms of the adapter and of the copies that an optimizer steps for it, if it does.
    """

    gradients: Gradients
    update: Update | None
    others_before: Floats | None
    others_after: Floats | None
    drift: BaseDrift | None
    skipped_inside: bool | None
    all_non_finite: bool
    tensor_sample: Sample
    gradient_sample: Sample
    followers: Floats | None
    copies: Floats | None


@dataclass(eq=False, slots=True)
class _Tickets:
    """Where the values of one decision will be found."""

    readout: Readout = field(default_factory=Readout)
    updates: list[UpdateReading] = field(default_factory=list)
    # gradients as the optimizer got them, or their norms where these are known
    received: list[GradientReading | Floats] = field(default_factory=list)
    gradients: list[GradientReading] = field(default_factory=list)
    before: range | None = None
    after: range | None = None
    skipped: range | None = None
    rows: list[tuple[TokenRows, range, range, int, int]] = field(default_factory=list)
    tensor_sample: range | None = None
    gradient_sample: range | None = None
    drift: range | None = None
    followers: range | None = None
    copies: range | None = None
    arrived: list[range] = field(default_factory=list)


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
        self._tickets = self._sent = _Tickets()
        self.token_rows: list[TokenRows] = []
        self._copies: dict[int, CopiesBefore] = {}  # by optimizer
        self._final: dict[int, Floats] = {}  # norms that nothing can change before the update
        self._scaled: dict[int, GradientReading] = {}  # of fused optimizers, which unscale them in place

    @property
    def waiting(self) -> bool:
        """Something was read that no decision has judged yet."""
        tickets = self._tickets
        return bool(tickets.updates or tickets.gradients) or tickets.after is not None

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
    def copy(self, optimizer: int) -> None:
        """Copy what an optimizer is about to change; the copies live until its step has ended."""
        if optimizer not in self._copies:
            self._copies[optimizer] = copy_before(self._owners.held(optimizer), self._tickets.readout)

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
        return self._tickets.readout.add(sample(list(by_role.values()), self._targets.device))

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
    def send(self, *, cotangents: list[torch.Tensor], sample: bool) -> None:
        """Gather on the device what a decision needs; the device may still be busy with the backward.

        Args:
            cotangents: Gradients of one element that arrived at outputs.
            sample: Look at the sampled base weights too.
        """
        self._sent, self._tickets = self._tickets, _Tickets()
        sent, readout = self._sent, self._sent.readout
        sent.drift = self._sample.read(readout) if sample else None
        sent.followers = self._others.followers.read(readout) if sample else None
        sent.copies = self._owners.copies.read(readout) if sample and self._owners.copies is not None else None
        sent.arrived = [readout.add(c.reshape(1)) for c in cotangents]
        readout.send()

    def receive(self, *, final: int | None, merges: int) -> Readings:
        """Bring what was sent to the host: the one transfer of a decision, and its one wait for the device.

        Args:
            final: The optimizer whose gradients nothing can change between this reading and the update.
            merges: Times that a layer was seen merged.

        Returns:
            What was read since the last time.
        """
        tickets, readout = self._sent, self._sent.readout
        readout.receive()
        for rows, came, sizes, step, framework_step in tickets.rows:
            rows.advance(readout.get(came), readout.get(sizes), step, framework_step)
        size = len(self._targets.slots)
        gradients = gradients_of(tickets.gradients, readout, size)
        if final is not None:
            self._final[final] = gradients.norm
        hopeless = any(not np.isfinite(readout.get(ticket)).all() for ticket in tickets.arrived)
        skipped = None if tickets.skipped is None else bool(readout.get(tickets.skipped)[0] > 0)
        update = None if skipped else self._update(tickets, size)
        samples = [
            (0.0,) * SAMPLE if ticket is None else tuple(readout.get(ticket).tolist())
            for ticket in (tickets.tensor_sample, tickets.gradient_sample)
        ]
        return Readings(
            gradients=gradients,
            update=update,
            others_before=None if tickets.before is None else readout.get(tickets.before),
            others_after=None if tickets.after is None else readout.get(tickets.after),
            drift=None if tickets.drift is None else self._sample.fact(readout.get(tickets.drift), merges),
            skipped_inside=skipped,
            all_non_finite=hopeless or bool(gradients.present.any() and not np.isfinite(gradients.norm).any()),
            tensor_sample=samples[0],
            gradient_sample=samples[1],
            followers=None if tickets.followers is None else readout.get(tickets.followers),
            copies=None if tickets.copies is None else readout.get(tickets.copies),
        )

    def _update(self, tickets: _Tickets, size: int) -> Update | None:
        enter = [partial(_enter, received, tickets.readout) for received in tickets.received]
        return update_of(tickets.updates, enter, tickets.readout, size)


def _enter(received: GradientReading | Floats, readout: Readout, column: Floats) -> None:
    """Norms of the gradients that one optimizer got, into the column of all."""
    if isinstance(received, GradientReading):
        received.norms(readout, column)
    else:
        known = ~np.isnan(received)
        column[known] = received[known]


def _flag(optimizer: Optimizer, readout: Readout) -> range | None:
    flag = found_inf(optimizer)
    return None if flag is None else readout.add(flag.reshape(1))
