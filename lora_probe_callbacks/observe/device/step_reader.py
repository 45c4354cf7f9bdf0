"""What is read from the device around one step, and its one way to the host.

A decision needs the gradients of its own step and what the update before it did. Both are put into
one readout as small tensors, and fetched together when the decision is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer

from lora_probe_callbacks.distributed.transport import sample
from lora_probe_callbacks.engine.collection import no_collection
from lora_probe_callbacks.facts import SAMPLE, BaseDrift, GradientFact, MoveFact, Role, Sample, StepUpdate
from lora_probe_callbacks.observe.device.base_drift import BaseSample
from lora_probe_callbacks.observe.device.gradients import GradientReading, gradient_fact, read_gradients
from lora_probe_callbacks.observe.device.token_rows import TokenRows
from lora_probe_callbacks.observe.device.transfer import Readout, local
from lora_probe_callbacks.observe.device.updates import CopiesBefore, UpdateReading, copy_before, move_fact, read_update
from lora_probe_callbacks.observe.model.ownership import found_inf, grad_scale, tensors_of
from lora_probe_callbacks.observe.model.targets import Scene

__all__ = ["DeviceReader", "Readings"]


@dataclass(frozen=True, slots=True)
class Readings:
    """What came to the host for one decision.

    Attributes:
        gradients: One entry a slot; None where nothing was read.
        gradient_norms: Likewise; None also where there is no gradient.
        update: The last probed update, or None.
        moves: What it did to each slot; empty without one.
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

    gradients: tuple[GradientFact | None, ...]
    gradient_norms: tuple[float | None, ...]
    update: StepUpdate | None
    moves: tuple[MoveFact | None, ...]
    others_before: list[float] | None
    others_after: list[float] | None
    drift: BaseDrift | None
    skipped_inside: bool | None
    all_non_finite: bool
    tensor_sample: Sample
    gradient_sample: Sample
    followers: list[float] | None
    copies: list[float] | None


@dataclass(eq=False, slots=True)
class _Tickets:
    """Where the values of one decision will be found."""

    readout: Readout = field(default_factory=Readout)
    updates: list[UpdateReading] = field(default_factory=list)
    # gradients as the optimizer got them, or their norms where these are known
    received: list[GradientReading | dict[int, float]] = field(default_factory=list)
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
        scene: What is expected to train.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._sample = BaseSample(scene.layers)
        self._tickets = self._sent = _Tickets()
        self.token_rows: list[TokenRows] = []
        self._copies: dict[int, CopiesBefore] = {}  # by optimizer
        self._final: dict[int, dict[int, float]] = {}  # norms that nothing can change before the update
        self._scaled: dict[int, GradientReading] = {}  # of fused optimizers, which unscale them in place

    @property
    def waiting(self) -> bool:
        """Something was read that no decision has judged yet."""
        tickets = self._tickets
        return bool(tickets.updates or tickets.gradients) or tickets.after is not None

    def forget(self) -> None:
        """Let go of all copies."""
        self._copies.clear()
        self._final.clear()
        self._scaled.clear()

    @torch.no_grad()
    def copy(self, optimizer: int) -> None:
        """Copy what an optimizer is about to change; the copies live until its step has ended."""
        if optimizer not in self._copies:
            self._copies[optimizer] = copy_before(self._scene.held(optimizer), self._tickets.readout)

    @torch.no_grad()
    def read_others_before(self) -> None:
        """Fingerprint the adapters that must stay as they are, before the step."""
        if self._tickets.before is None:
            self._tickets.before = self._scene.read_fingerprints(self._tickets.readout)

    @torch.no_grad()
    def read_gradients(self, optimizer: int, *, unowned: bool) -> None:
        """Read the gradients that an optimizer is about to apply."""
        held = self._scene.held(optimizer, unowned=unowned)
        scale = grad_scale(self._scene.optimizers[optimizer])
        self._tickets.gradients.append(read_gradients(held, self._tickets.readout, scale))

    @torch.no_grad()
    def read_scaled(self, optimizer: int) -> None:
        """Directly before the step of a fused optimizer under a scaler: its kernel writes over the gradients."""
        scale = grad_scale(self._scene.optimizers[optimizer])
        if scale is not None and optimizer not in self._final:
            self._scaled[optimizer] = read_gradients(self._scene.held(optimizer), self._tickets.readout, scale)

    @torch.no_grad()
    def read_samples(self, optimizer: int | None) -> None:
        """Sample what every rank should hold alike, and its gradients if an optimizer is about to apply them."""
        scene, tickets = self._scene, self._tickets
        tickets.tensor_sample = self._sampled(scene.whole())
        if optimizer is not None:
            mine = scene.tensors(optimizer, unowned=True)
            grads = {i: t.grad for i, t in scene.whole().items() if i in mine and t.grad is not None}
            tickets.gradient_sample = self._sampled({i: g for i, g in grads.items() if not g.is_sparse})

    def _sampled(self, tensors: dict[int, torch.Tensor]) -> range:
        by_role: dict[Role, list[torch.Tensor]] = {"A": [], "B": [], "other": []}
        for index, tensor in tensors.items():
            by_role[self._scene.slots[index].role].append(local(tensor))
        return self._tickets.readout.add(sample(list(by_role.values()), self._scene.device))

    @no_collection()
    @torch.no_grad()
    def read_after(self, optimizer: int, step: int, framework_step: int) -> None:
        """Directly after a step: what did it change, and what were the gradients that it got?"""
        copies = self._copies.pop(optimizer, None)
        self._scene.forget_kinds()
        received = self._final.pop(optimizer, None) or self._scaled.pop(optimizer, None)
        if copies is None:
            return
        tickets, inner = self._tickets, self._scene.optimizers[optimizer]
        mine = self._scene.tensors(optimizer)
        update = read_update(copies, mine, tickets.readout, step, framework_step)
        if update is not None:
            tickets.updates.append(update)
            tickets.received.append(received or read_gradients(self._scene.held(optimizer), tickets.readout, None))
        self._read_rows(inner, step, framework_step)
        tickets.skipped = _flag(inner, tickets.readout)
        tickets.after = self._scene.read_fingerprints(tickets.readout)

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
        sent.followers = self._scene.followers.read(readout) if sample else None
        sent.copies = self._scene.copies.read(readout) if sample and self._scene.copies is not None else None
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
        read: dict[int, float | None] = {}
        for reading in tickets.gradients:  # the last word counts: what had a gradient may have none by now
            read.update(dict.fromkeys(reading.slots) | reading.norms(readout))
        norms = {slot: norm for slot, norm in read.items() if norm is not None}
        if final is not None:
            self._final[final] = norms
        slots = range(len(self._scene.slots))
        column = tuple(map(norms.get, slots))
        gradients = tuple([gradient_fact(norm) if slot in read else None for slot, norm in enumerate(column)])
        hopeless = any(not math.isfinite(v) for ticket in tickets.arrived for v in readout.get(ticket))
        skipped = None if tickets.skipped is None else readout.get(tickets.skipped)[0] > 0
        update = None if skipped else self._update(tickets)
        samples = [
            (0.0,) * SAMPLE if ticket is None else tuple(readout.get(ticket))
            for ticket in (tickets.tensor_sample, tickets.gradient_sample)
        ]
        return Readings(
            gradients=gradients,
            gradient_norms=column,
            update=update,
            moves=() if update is None else tuple(map(move_fact, update.norms, update.moved)),
            others_before=None if tickets.before is None else readout.get(tickets.before),
            others_after=None if tickets.after is None else readout.get(tickets.after),
            drift=None if tickets.drift is None else self._sample.fact(readout.get(tickets.drift), merges),
            skipped_inside=skipped,
            all_non_finite=hopeless or (bool(norms) and not any(map(math.isfinite, norms.values()))),
            tensor_sample=samples[0],
            gradient_sample=samples[1],
            followers=None if tickets.followers is None else readout.get(tickets.followers),
            copies=None if tickets.copies is None else readout.get(tickets.copies),
        )

    def _update(self, tickets: _Tickets) -> StepUpdate | None:
        if not tickets.updates:
            return None
        changes: dict[int, tuple[float, float, float, float]] = {}
        received: dict[int, float] = {}
        for update, norms in zip(tickets.updates, tickets.received, strict=True):
            changes.update(update.changes(tickets.readout))
            received.update(norms if isinstance(norms, dict) else norms.norms(tickets.readout))
        nothing = (None, None, None, None)
        rows = [changes.get(i, nothing) for i in range(len(self._scene.slots))]
        starts, sizes, after, moved = zip(*rows, strict=True) if rows else ((),) * 4
        return StepUpdate(
            step=tickets.updates[0].step,
            framework_step=tickets.updates[0].framework_step,
            starts=starts,
            sizes=sizes,
            norms=after,
            moved=moved,
            gradient_norms=tuple([received.get(i) if i in changes else None for i in range(len(rows))]),
        )


def _flag(optimizer: Optimizer, readout: Readout) -> range | None:
    flag = found_inf(optimizer)
    return None if flag is None else readout.add(flag.reshape(1))
