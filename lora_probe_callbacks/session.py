"""The life of one probed run: what is meant to train, when to look, what was healthy, what to do.

All state is here. Observers hand in facts, checks judge them, the report writes; this module decides
when that happens. A **decision** is made once per step, at the first optimizer event of the step and
before the update wherever the event comes before it, and covers everything observed up to then. What
is seen later is judged by the next one.
"""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lora_probe_callbacks.checks.base import Check, Verdict
from lora_probe_callbacks.checks.catalogue import explain, selected
from lora_probe_callbacks.observe.adapters import Slot, Unit, take_inventory
from lora_probe_callbacks.observe.facts import (
    BaseDrift,
    Facts,
    GradientFact,
    Moment,
    OtherAdapter,
    SlotFact,
    SlotHistory,
    StepUpdate,
    UnitFact,
)
from lora_probe_callbacks.observe.forwards import ForwardObserver
from lora_probe_callbacks.observe.gradients import GradientReading, read_gradients
from lora_probe_callbacks.observe.idle import AdaptersElsewhere, idle_part
from lora_probe_callbacks.observe.optimizers import found_inf, grad_scale, ownership, tensors_of, unwrap_optimizer
from lora_probe_callbacks.observe.readout import Readout
from lora_probe_callbacks.observe.repeat import compare_with_fresh_weights, random_state, why_not
from lora_probe_callbacks.observe.updates import (
    BaseSample,
    Fingerprints,
    UpdateReading,
    copy_before,
    read_update,
)
from lora_probe_callbacks.observe.witness import WeightWitness
from lora_probe_callbacks.report.console import finding_panel, health_table
from lora_probe_callbacks.report.findings import Finding, LoraProbeError, LoraProbeWarning, ProbeReport
from lora_probe_callbacks.report.metrics import metrics_of_step, metrics_of_update
from lora_probe_callbacks.report.record import Record

__all__ = ["ProbeConfig", "ProbeSession"]

ALWAYS = 4  # the first steps are always probed: most faults are there from the start
REPEATS_EVERY = 16  # after them, one probed step in so many runs a forward a second time


@dataclass(frozen=True, slots=True)
class ProbeConfig:
    """What the user meant, and when to look. The same keyword arguments open every front door.

    Args:
        adapter: Name(s) that must train; default: the adapters active when training starts.
        reference_adapters: Names that must stay frozen.
        lagged_adapters: Names that must slowly follow the trained one.
        reference: ``"disabled"`` if the loss compares with this model, its adapters disabled.
        resumed: True if the adapter was restored, False if it is new.
        expect_targets: Name parts that must each own an adapted module.
        new_token_ids: Added vocabulary rows that must learn.
        frozen: Name parts of adapter tensors that are meant to stay frozen.
        every_n_steps: Cadence of the periodic checks; the first four steps are always probed.
        on_failure: ``"raise"``, ``"stop"`` (graceful) or ``"warn"``.
        select: Codes or prefixes of the checks to run; default: all.
        ignore: Codes or prefixes to leave out.
        estimator: An estimator to watch and log.
        record: Path of the append-only record.
        verbose: Print findings and the health table (rank 0 only).

    Raises:
        ValueError: If an argument has a value that cannot be meant.
    """

    adapter: str | Sequence[str] | None = None
    reference_adapters: Sequence[str] = ()
    lagged_adapters: Sequence[str] = ()
    reference: Literal["disabled"] | None = None
    resumed: bool | None = None
    expect_targets: Sequence[str] = ()
    new_token_ids: Sequence[int] = ()
    frozen: Sequence[str] = ()
    every_n_steps: int = 50
    on_failure: Literal["raise", "stop", "warn"] = "raise"
    select: Sequence[str] | None = None
    ignore: Sequence[str] = ()
    estimator: object = None
    record: str | Path | None = None
    verbose: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.every_n_steps, bool) or not isinstance(self.every_n_steps, int) or self.every_n_steps < 1:
            raise ValueError(f"every_n_steps got {self.every_n_steps!r}, expected an integer of at least 1")
        if self.on_failure not in ("raise", "stop", "warn"):
            raise ValueError(f"on_failure got {self.on_failure!r}, expected 'raise', 'stop' or 'warn'")
        if self.reference not in (None, "disabled"):
            raise ValueError(f"reference got {self.reference!r}, expected None or 'disabled'")
        for name in ("reference_adapters", "lagged_adapters", "frozen", "expect_targets"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"{name} got the string {value!r}, expected a sequence: ({value!r},)")
        both = set(self.names or ()) & (set(self.reference_adapters) | set(self.lagged_adapters))
        if both:
            raise ValueError(
                f"adapter {sorted(both)} is expected to train and declared as reference or lagged: choose one"
            )
        selected(self.select, self.ignore)

    @property
    def names(self) -> tuple[str, ...] | None:
        """The expected names, if any were given."""
        if self.adapter is None:
            return None
        return (self.adapter,) if isinstance(self.adapter, str) else tuple(self.adapter)


@dataclass(eq=False, slots=True)
class _Pending:
    """What was read from the device after the last decision, on its way to the next."""

    readout: Readout
    updates: list[UpdateReading]
    received: list[GradientReading]  # gradients as the optimizer received them
    late: list[GradientReading] = field(default_factory=list)  # of further optimizers of a decided step
    before: range | None = None  # fingerprints of what must stay, before and after the step
    after: range | None = None
    skipped_inside: range | None = None  # a fused optimizer's own flag

    @property
    def waiting(self) -> bool:
        return bool(self.updates or self.late) or self.after is not None


class ProbeSession:
    """One probed run.

    Args:
        config: What was meant.
        log: Receives the metrics of a step and the framework's number of that step.
        main_rank: This process prints and records.
    """

    def __init__(
        self,
        config: ProbeConfig,
        *,
        log: Callable[[dict[str, float], int], None] | None = None,
        main_rank: bool = True,
    ) -> None:
        self.config = config
        self.report = ProbeReport()
        self.should_stop = False
        self.step = 0
        self._log = log
        self._console = Console() if main_rank and config.verbose else None
        self._record = Record(config.record) if main_rank and config.record is not None else None
        self._checks: list[Check] = list(selected(config.select, config.ignore))
        self._by_code = {check.code: check for check in self._checks}
        self._results: dict[tuple[str, str], Finding] = {}
        self._baseline: dict[str, Any] | None = None  # the last healthy state, in words
        self._running = False
        self._broken = False

    # --- life -------------------------------------------------------------------------------

    def start(
        self,
        roots: Iterable[tuple[str, nn.Module]],
        optimizers: Iterable[object],
        *,
        scaler: torch.amp.GradScaler | None = None,
        framework_step: Callable[[], int] | None = None,
    ) -> None:
        """Begin: find the adapters, take hold of the optimizers, arm the hooks of the first step.

        Args:
            roots: (name, module) pairs that hold what is trained.
            optimizers: The optimizers that step it; wrappers are opened.
            scaler: A gradient scaler, if the loop has one.
            framework_step: The framework's own step counter.

        Raises:
            ValueError: If there is no adapter, or a name that does not exist.
        """
        self._roots = list(roots)
        self._optimizers: list[Optimizer] = [unwrap_optimizer(o) for o in optimizers]
        self._scaler = scaler
        self._framework_step = framework_step or (lambda: self.step)
        self._inventory = take_inventory(self._roots)
        self._check_names()
        self._history: list[SlotHistory] = []
        self._decided_start = False
        self._error: LoraProbeError | None = None
        self._skipped_in_a_row = 0
        self._ever_stepped = False
        self._merges = 0
        self._was_active: set[str] = set()
        self._ever_changed: set[str] = set()
        self._bypassed: set[int] = set()
        self._suspects: set[int] = set()
        self._elsewhere = AdaptersElsewhere()
        self._overhead = 0.0
        self._probed_before = 0
        self._pending = _Pending(Readout(), [], [])
        self._expect(self._resolve_expected())
        self._sample = BaseSample([unit.layer for unit in self._units])
        self._handles: list[RemovableHandle] = []
        for index, optimizer in enumerate(self._optimizers):
            before, after = self._before_step(index), self._after_step(index)
            self._handles.append(optimizer.register_step_pre_hook(before))
            self._handles.append(optimizer.register_step_post_hook(after))
        self._running = True
        self._begin_step()
        if self._record is not None:
            self._record.write("start", versions=_versions(), adapters=self._expected, tensors=len(self._slots))

    @property
    def running(self) -> bool:
        """Between start and end."""
        return self._running

    def end(self) -> None:
        """End a run that went well: judge what is left, take all hooks away, print the table."""
        if not self._running:
            return
        try:
            self._decide("end", None)
        finally:
            self.close()
            self._finish_report()

    def abort(self, error: BaseException) -> None:
        """End a run that was left by an exception; what it shows of the adapter becomes a note on it.

        Args:
            error: The exception that is on its way to the user. It is never replaced.
        """
        if not self._running:
            return
        try:
            if not isinstance(error, LoraProbeError | KeyboardInterrupt | SystemExit | GeneratorExit):
                self._note_on(error)
        finally:
            self.close()
            self._finish_report()

    def close(self) -> None:
        """Remove every hook. May be called at any time and any number of times."""
        if not self._running:
            return
        self._running = False
        self._observer.disarm()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._copies.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a later session should know: the last healthy state."""
        return {"baseline": self._baseline}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the last healthy state of an earlier session.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self._baseline = state.get("baseline")

    # --- what is meant ----------------------------------------------------------------------

    def _check_names(self) -> None:
        inventory, config = self._inventory, self.config
        if not inventory.units and not inventory.unloaded:
            names = ", ".join(f"{name or 'the model'} ({type(module).__name__})" for name, module in self._roots)
            raise ValueError(
                f"found no PEFT adapter in {names}; expected a PeftModel or a model with add_adapter(): attach the "
                "adapter before training starts (a model that was merged and unloaded has none left)"
            )
        asked = {
            "adapter": config.names or (),
            "reference_adapters": config.reference_adapters,
            "lagged_adapters": config.lagged_adapters,
        }
        for argument, names in asked.items():
            unknown = [name for name in names if name not in inventory.adapters]
            if unknown and not inventory.unloaded:
                raise ValueError(f"{argument} got {unknown}, expected names among {inventory.adapters}")

    def _resolve_expected(self) -> tuple[str, ...]:
        """The adapters that must train: as declared, else those active now that are no reference."""
        if self.config.names is not None:
            return self.config.names
        aside = set(self.config.reference_adapters) | set(self.config.lagged_adapters)
        active = tuple(name for name in self._inventory.active if name not in aside)
        return active or tuple(name for name in self._inventory.adapters if name not in aside)

    def _expect(self, names: tuple[str, ...]) -> None:
        """Settle which units are expected to train, and watch them."""
        self._expected = names
        self._units: list[Unit] = [u for u in self._inventory.units if u.adapter in names]
        self._choose_model()
        self._slots: list[Slot] = [slot for unit in self._units for slot in unit.slots]
        unit_of = {id(unit): i for i, unit in enumerate(self._units)}
        self._unit_of_slot = [unit_of[id(unit)] for unit in self._units for _ in unit.slots]
        self._history = [SlotHistory() for _ in self._slots]
        self._start_tensors = [slot.tensor for slot in self._slots]
        self._copies: dict[int, dict[int, torch.Tensor]] = {}  # optimizer to slot to its copy
        expected = {id(unit) for unit in self._units}
        self._others: dict[str, list[Slot]] = {}
        for unit in self._inventory.units:
            if id(unit) not in expected:
                self._others.setdefault(unit.adapter, []).extend(unit.slots)
        self._fingerprints = {
            name: Fingerprints({s.name: t for s in slots if (t := s.tensor) is not None})
            for name, slots in self._others.items()
            if name not in self.config.lagged_adapters
        }
        armed = hasattr(self, "_observer") and self._observer.armed
        if armed:
            self._observer.disarm()
        self._observer = ForwardObserver(
            self._inventory, self._units, before=self._before_forward, after=self._after_forward, on_error=self._break
        )
        if armed:
            self._observer.arm()

    def _choose_model(self) -> None:
        """With several models that hold adapters, the expected ones are those that an optimizer owns."""
        groups = {unit.layer.group for unit in self._units}
        if len(groups) < 2:
            return
        owned = {
            unit.layer.group
            for unit in self._units
            for slot in unit.slots
            if id(slot.tensor) in ownership(self._optimizers)
        }
        if not owned:
            names = sorted(self._inventory.groups[group] for group in groups)
            raise ValueError(
                f"found {len(groups)} models with adapters ({', '.join(names)}), and the optimizers own tensors of none: "
                "build the optimizer from the one that should train, or pass adapter= with a name that only this one has"
            )
        self._units = [unit for unit in self._units if unit.layer.group in owned]

    # --- steps ------------------------------------------------------------------------------

    @property
    def _probed(self) -> bool:
        return self.step < ALWAYS or self.step % self.config.every_n_steps == 0

    def _begin_step(self) -> None:
        self._decided = False
        self._ready: set[int] = set()  # optimizers whose gradients were announced in this step
        self._stepping: set[int] = set()  # inside their step()
        self._stepped: set[int] = set()
        self._discarded: set[int] = set()
        self._times: dict[int, int] = {}
        self._stale: tuple[bool, str] | None = None
        self._why_no_repeat: str | None = None
        self._random: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._observer.reset()
        if self._probed and not self._broken:
            if self._suspects and not self._inventory.compiled:
                weights = {id(w): u for u in self._suspects if (w := _base_weight(self._units[u])) is not None}
                self._observer.witness = WeightWitness(weights)
            self._observer.arm()
        elif self._observer.armed:
            self._observer.disarm()

    def _end_step(self) -> None:
        if self._stepped:
            self._ever_stepped = True
            self._skipped_in_a_row = 0
        else:
            self._skipped_in_a_row += 1
        self._was_active |= self._observer.active_seen
        self._merges += self._observer.merged_seen
        self.step += 1
        self._begin_step()

    def _owners(self) -> set[int]:
        """The optimizers that own intended tensors; all of them if none does."""
        owners = ownership(self._optimizers)
        found = {own.optimizer for s in self._slots if (own := owners.get(id(s.tensor))) is not None}
        return found or set(range(len(self._optimizers)))

    def _close_if_done(self) -> None:
        """End the step once every owner has stepped, or has nothing left to step."""
        owners = self._owners()
        done = self._stepped | self._discarded
        if owners <= done:
            self._end_step()

    def _has_gradients(self, optimizer: int) -> bool:
        return any(t.grad is not None for g in self._optimizers[optimizer].param_groups for t in g["params"])

    # --- events -----------------------------------------------------------------------------

    def gradients_ready(self, optimizer: object, *, final: bool = False) -> None:
        """Tell that the gradients of this step are complete and the optimizer is about to step.

        Args:
            optimizer: The optimizer, or a wrapper around it.
            final: Nothing can change the gradients between now and the update.

        Raises:
            LoraProbeError: If something fails and ``on_failure`` is ``"raise"``.
        """
        inner = unwrap_optimizer(optimizer)
        for index, candidate in enumerate(self._optimizers):
            if candidate is inner and self._running:
                self._optimizer_event(index, final=final)

    def _before_step(self, index: int) -> Callable[..., None]:
        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._running:
                return
            closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
            if closure is None:
                self._optimizer_event(index, final=True)
            elif index in self._stepped:
                self._event_after_step(index)
            if closure is not None and self._probed:
                self._guarded(lambda: self._take_copies(index))
            self._stepping.add(index)

        return hook

    def _after_step(self, index: int) -> Callable[..., None]:
        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._running:
                return
            if index not in self._ready:  # a closure: only now the gradients of this step can be seen
                self._optimizer_event(index, final=False)
            self._stepping.discard(index)
            self._stepped.add(index)
            self._times[index] = self._times.get(index, 0) + 1
            self._guarded(lambda: self._read_after(index))
            self._close_if_done()

        return hook

    def _optimizer_event(self, index: int, *, final: bool) -> None:
        if index in self._stepped:
            self._event_after_step(index)
        elif index in self._ready and index not in self._stepping and not final:
            # Announced twice and never stepped in between: the first one was skipped.
            self._discarded.add(index)
            self._close_if_done()
        self._observer.close_witness()
        first_of_optimizer = index not in self._ready
        self._ready.add(index)
        self._reraise()
        if not self._decided:
            self._decided = True
            if self._probed or self._pending.waiting:
                self._decide("step", index, final=final)
        elif first_of_optimizer and self._probed:
            self._guarded(lambda: self._read_for_next_decision(index))
        if self._probed:
            self._guarded(lambda: self._take_copies(index))
            self._guarded(self._read_before)

    def _event_after_step(self, index: int) -> None:
        """An optimizer begins again while others of this step have not stepped."""
        for other in self._owners() - self._stepped:
            # One that holds gradients accumulates over several of our steps; 16 of them are enough to wait.
            if not self._has_gradients(other) or self._times.get(index, 0) >= 16:
                self._discarded.add(other)
        self._close_if_done()

    def _before_forward(self) -> None:
        """A candidate for a training forward is about to run."""
        if not self._decided_start:
            self._start_decision()
        self._close_skipped()
        self._reraise()
        if self._probed and self._repeat_due() and self._random is None:
            self._random = random_state(self._device())

    def _close_skipped(self) -> None:
        """Close a step whose update never came: it was skipped, or its gradients were thrown away."""
        waiting = self._ready - self._stepped - self._stepping
        backward = any(c.received for c in self._observer.candidates)
        if self._stepping or (not waiting and not (backward and not self._ready)):
            return
        self._discarded |= waiting
        if not self._ready:
            self._discarded |= {o for o in self._owners() if not self._has_gradients(o)}
        if self._owners() <= self._stepped | self._discarded:
            if not self._decided:
                self._decided = True
                self._decide("skipped", None)
            self._end_step()

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Directly after a candidate, before its backward: run it again where that is due."""
        if self._random is None or self._stale is not None or self._why_no_repeat is not None:
            return
        device = self._device()
        self._why_no_repeat = why_not(module, args, kwargs, device)
        if self._why_no_repeat is not None:
            return
        self._observer.paused = True
        try:
            result = compare_with_fresh_weights(module, args, kwargs, output, self._random, device)
        finally:
            self._observer.paused = False
        if isinstance(result, str):
            self._why_no_repeat = result
        else:
            self._stale = result

    def _repeat_due(self) -> bool:
        """A forward can be stale only after a first update."""
        wanted = any(check.code == "LP405" for check in self._checks)
        return wanted and (1 <= self.step < ALWAYS or self._probed_before % REPEATS_EVERY == REPEATS_EVERY - 1)

    def _device(self) -> torch.device:
        return next((t.device for s in self._slots if (t := s.tensor) is not None), torch.device("cpu"))

    # --- reading ----------------------------------------------------------------------------

    def _tensors(self, optimizer: int | None, *, unowned: bool) -> dict[int, torch.Tensor]:
        """Slots whose tensors the optimizer owns, and on request those that nobody owns."""
        owners = ownership(self._optimizers)
        tensors: dict[int, torch.Tensor] = {}
        for index, slot in enumerate(self._slots):
            tensor = slot.tensor
            if tensor is None:
                continue
            own = owners.get(id(tensor))
            if (own is None and unowned) or (own is not None and own.optimizer == optimizer):
                tensors[index] = tensor
        return tensors

    def _take_copies(self, optimizer: int) -> None:
        if optimizer in self._copies:
            return
        self._copies[optimizer] = copy_before(self._tensors(optimizer, unowned=False))

    def _read_before(self) -> None:
        if self._fingerprints and self._pending.before is None:
            self._pending.before = self._read_fingerprints()

    def _read_fingerprints(self) -> range:
        start = stop = 0
        for number, prints in enumerate(self._fingerprints.values()):
            ticket = prints.read(self._pending.readout)
            start, stop = (ticket.start if number == 0 else start), ticket.stop
        return range(start, stop)

    def _read_after(self, optimizer: int) -> None:
        """Directly after a step: what did it change, and what were the gradients that it got?"""
        copies = self._copies.pop(optimizer, None)
        if copies is None:
            return
        mine = self._tensors(optimizer, unowned=False)
        pending, inner = self._pending, self._optimizers[optimizer]
        update = read_update(copies, mine, pending.readout, self.step, self._framework_step())
        if update is not None:
            pending.updates.append(update)
            pending.received.append(read_gradients(mine, pending.readout, grad_scale(inner)))
        flag = found_inf(inner)
        if flag is not None:
            pending.skipped_inside = pending.readout.add(flag.reshape(1))
        if self._fingerprints:
            pending.after = self._read_fingerprints()

    def _read_for_next_decision(self, optimizer: int) -> None:
        """A further optimizer of a step that is decided already."""
        tensors = self._tensors(optimizer, unowned=False)
        reading = read_gradients(tensors, self._pending.readout, grad_scale(self._optimizers[optimizer]))
        self._pending.late.append(reading)

    # --- deciding ---------------------------------------------------------------------------

    def _start_decision(self) -> None:
        self._decided_start = True
        if self.config.names is None:
            now = self._resolve_expected()
            if now != self._expected:  # the module's own hooks activated another adapter meanwhile
                self._guarded(lambda: self._expect(now))
        self._decide("start", None)

    def _decide(self, moment: Moment, optimizer: int | None, *, final: bool = False) -> None:
        """Judge everything observed up to now, once; tell it, and act on it."""
        if self._broken:
            return
        began = time.perf_counter()
        try:
            facts = self._collect(moment, optimizer, final=final)
            verdicts = self._judge(facts)
        except Exception as error:
            self._break(error)
            return
        new = self._note(facts, verdicts)
        self._overhead += (time.perf_counter() - began) * 1e3
        self._emit(facts)
        if self._record is not None:
            self._guarded(lambda: self._write_record(facts, verdicts))
        self._act(verdicts, new, moment)

    def _collect(self, moment: Moment, optimizer: int | None, *, final: bool) -> Facts:
        if not self._inventory.in_place:
            self._inventory = take_inventory(self._roots)
            history = self._history
            observer = self._observer
            self._expect(self._expected)
            if len(history) == len(self._history):
                self._history = history
            self._observer.candidates = observer.candidates
        pending, self._pending = self._pending, _Pending(Readout(), [], [])
        reading = sample = None
        if optimizer is not None and self._probed:
            tensors = self._tensors(optimizer, unowned=True)
            reading = read_gradients(tensors, pending.readout, grad_scale(self._optimizers[optimizer]))
            sample = self._sample.read(pending.readout)
        cotangents = pending.readout.add_all(self._observer.cotangents())
        pending.readout.fetch()  # the one transfer of this decision
        return self._facts(moment, optimizer, pending, reading, sample, cotangents, final=final)

    def _facts(
        self,
        moment: Moment,
        optimizer: int | None,
        pending: _Pending,
        reading: GradientReading | None,
        sample: range | None,
        cotangents: range,
        *,
        final: bool,
    ) -> Facts:
        observer, inventory = self._observer, self._inventory
        owners = ownership(self._optimizers)
        tensors = [slot.tensor for slot in self._slots]
        slot_of = {id(t): i for i, t in enumerate(tensors) if t is not None}
        slots = tuple(
            self._slot_fact(slot, tensor, unit, owners.get(id(tensor)))
            for slot, tensor, unit in zip(self._slots, tensors, self._unit_of_slot, strict=True)
        )
        read = {i: g for late in pending.late for i, g in late.facts(pending.readout).items()}
        read.update({} if reading is None else reading.facts(pending.readout))
        gradients = tuple(read.get(i) for i in range(len(slots)))
        update = self._update_fact(pending)
        skipped_inside = pending.skipped_inside is not None and pending.readout.get(pending.skipped_inside)[0] > 0
        if skipped_inside:
            self._skipped_in_a_row += 1
            update = None
        scaler = self._scaler is not None or any(grad_scale(o) is not None for o in self._optimizers)
        overflows = scaler and any(g is not None and not g.finite for g in gradients)
        skipped = self._skipped_in_a_row + (moment == "skipped" or overflows)
        self._update_history(slots, gradients, update)
        replaced, foreign = self._replaced(slots, tensors, owners)
        others = self._other_facts(pending)
        forwards = observer.facts(slot_of)
        called = observer.called()
        units = self._unit_facts(forwards, gradients, called)
        drift: BaseDrift | None = None
        if sample is not None:
            drift = self._sample.fact(pending.readout.get(sample), self._merges)
        evidence: dict[str, str] = {}
        if self._why_no_repeat is not None:
            evidence["LP405"] = self._why_no_repeat
        present = [g for g in gradients if g is not None and g.present]
        if (present and not any(g.finite for g in present)) or any(
            not math.isfinite(v) for v in pending.readout.get(cotangents)
        ):
            evidence["all_non_finite"] = "yes"
        facts = Facts(
            moment=moment,
            optimizer=optimizer,
            step=self.step - 1 if moment == "end" and self.step and not self._observer.candidates else self.step,
            framework_step=self._framework_step(),
            expected=self._expected,
            declared=self.config.names is not None,
            slots=slots,
            units=units,
            modes=observer.modes(),
            active=inventory.active,
            history=tuple(self._history),
            forwards=forwards,
            forwards_without_grad=observer.without_grad,
            unobservable=self._unobservable(),
            gradients=gradients,
            gradients_final=final,
            update=update,
            others=others,
            base_drift=drift,
            trainable_bases=self._trainable_bases(),
            replaced=replaced,
            foreign_in_optimizer=foreign,
            optimizer_tensors=sum(1 for _ in tensors_of(self._optimizers)),
            optimizers=len(self._optimizers),
            nested=tuple(inventory.nested),
            rewrapped=tuple(inventory.rewrapped),
            unloaded=tuple(inventory.unloaded),
            skipped_in_a_row=skipped,
            ever_stepped=self._ever_stepped,
            scaler=scaler,
            loss_scale=self._loss_scale(skipped),
            stale_forward=self._stale,
            evidence=evidence,
        )
        if self._nobody_called(facts):
            elsewhere = self._elsewhere.look([layer.module for layer in inventory.layers])
            facts = dataclasses.replace(facts, elsewhere=elsewhere)
        return facts

    def _slot_fact(self, slot: Slot, tensor: torch.Tensor | None, unit: int, own: Any) -> SlotFact:
        frozen = slot.frozen or any(part in slot.name for part in self.config.frozen)
        return SlotFact(
            name=slot.name,
            adapter=slot.adapter,
            role=slot.role,
            unit=unit,
            requires_grad=tensor is not None and tensor.requires_grad,
            owner=None if own is None else own.optimizer,
            learning_rate=None if own is None else own.learning_rate,
            weight_decay=None if own is None else own.weight_decay,
            frozen_by_intent=frozen,
            half=tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16),
            numel=0 if tensor is None else tensor.numel(),
        )

    def _update_fact(self, pending: _Pending) -> StepUpdate | None:
        if not pending.updates:
            return None
        by_slot = {}
        norms: dict[int, float] = {}
        for update, received in zip(pending.updates, pending.received, strict=True):
            by_slot.update(update.facts(pending.readout))
            norms.update({i: g.norm for i, g in received.facts(pending.readout).items() if g.present})
        first = pending.updates[0]
        return StepUpdate(
            step=first.step,
            framework_step=first.framework_step,
            slots=tuple(by_slot.get(i) for i in range(len(self._slots))),
            gradient_norms=tuple(norms.get(i) for i in range(len(self._slots))),
        )

    def _update_history(
        self, slots: tuple[SlotFact, ...], gradients: tuple[GradientFact | None, ...], update: StepUpdate | None
    ) -> None:
        for i, slot in enumerate(slots):
            old, new = self._history[i], {}
            if update is not None and (u := update.slots[i]) is not None:
                # Judged against the gradient and the rate that were read before this update.
                could_move = old.had_gradient and old.zero == 0 and old.missing == 0 and old.rate_zero == 0
                new["unmoved"] = old.unmoved + 1 if could_move and u.moved == 0 else 0
                new["lost"] = old.lost + 1 if could_move and slot.half and u.moved < 0.5 else 0
                new["had_move"] = old.had_move or u.moved > 0
            gradient = gradients[i]
            if gradient is not None:
                new["read"] = old.read + 1
                new["missing"] = 0 if gradient.present else old.missing + 1
                new["zero"] = old.zero + 1 if gradient.present and gradient.zero else 0
                new["had_gradient"] = old.had_gradient or gradient.present
                new["had_signal"] = old.had_signal or (gradient.present and not gradient.zero)
                rate = slot.learning_rate
                if rate is not None:
                    new["rate_zero"] = old.rate_zero + 1 if rate == 0.0 else 0
                    new["had_rate"] = old.had_rate or rate != 0.0
                    new["rate_rising"] = old.rate is not None and rate > old.rate
                    new["rate"] = rate  # type: ignore[assignment]
            if new:
                self._history[i] = dataclasses.replace(old, **new)  # type: ignore[arg-type]

    def _replaced(
        self, slots: tuple[SlotFact, ...], tensors: list[torch.Tensor | None], owners: Mapping[int, object]
    ) -> tuple[tuple[int, ...], int]:
        """Slots without an owner whose former tensor, or a twin of it, is what the optimizer holds."""
        lost = [i for i, slot in enumerate(slots) if slot.owner is None]
        if not lost:
            return (), 0
        known = {id(p) for _, root in self._roots for p in root.parameters()}
        foreign = [t for t in tensors_of(self._optimizers) if id(t) not in known]
        shapes = [t.shape for t in foreign]
        replaced = []
        for i in lost:
            tensor, former = tensors[i], self._start_tensors[i]
            was_owned = former is not None and former is not tensor and id(former) in owners
            if was_owned:
                replaced.append(i)
            elif tensor is not None and tensor.shape in shapes:
                shapes.remove(tensor.shape)
                replaced.append(i)
        return tuple(replaced), len(foreign)

    def _other_facts(self, pending: _Pending) -> tuple[OtherAdapter, ...]:
        changed: dict[str, tuple[str, ...]] = {}
        offset = 0
        drifted: dict[str, tuple[str, ...]] = {}
        before = pending.readout.get(pending.before) if pending.before is not None else None
        after = pending.readout.get(pending.after) if pending.after is not None else None
        for name, prints in self._fingerprints.items():
            part = slice(offset, offset + prints.size)
            if before is not None:
                drifted[name] = prints.changed(before[part])
            if after is not None:
                inside = before is not None
                (changed if inside else drifted)[name] = prints.changed(after[part])
            offset += prints.size
        owners = ownership(self._optimizers)
        active = self._inventory.active
        facts = []
        for name, slots in self._others.items():
            tensors = [t for s in slots if (t := s.tensor) is not None]
            declared: Literal["reference", "lagged"] | None = None
            if name in self.config.reference_adapters:
                declared = "reference"
            elif name in self.config.lagged_adapters:
                declared = "lagged"
            moved = changed.get(name, ())
            if drifted.get(name):
                self._ever_changed.add(name)
                moved = moved or (drifted[name] if declared == "reference" else ())
            if moved:
                self._ever_changed.add(name)
            facts.append(
                OtherAdapter(
                    name=name,
                    declared=declared,
                    tensors=len(tensors),
                    trainable=sum(t.requires_grad for t in tensors),
                    owned=sum(id(t) in owners for t in tensors),
                    changed=moved,
                    was_active=name in self._was_active or name in self._observer.active_seen,
                    ever_changed=name in self._ever_changed,
                    active_now=name in active,
                )
            )
        return tuple(facts)

    def _unit_facts(
        self, forwards: Sequence[Any], gradients: tuple[GradientFact | None, ...], called: set[int]
    ) -> tuple[UnitFact, ...]:
        if self._observer.witness is not None:
            self._bypassed |= self._observer.witness.used
        watched = any(f.received and f.calls is not None for f in forwards)
        units = []
        start = 0
        for index, unit in enumerate(self._units):
            slots = tuple(range(start, start + len(unit.slots)))
            start += len(unit.slots)
            part = idle_part(unit, called, self._inventory) if watched else None
            silent = all((g := gradients[s]) is None or not g.present or g.zero for s in slots)
            if part in ("layer", "sibling") and silent:
                self._suspects.add(index)
            elif watched and (part is None or not silent):
                self._suspects.discard(index)
                self._bypassed.discard(index)
            units.append(
                UnitFact(
                    name=unit.layer.name,
                    adapter=unit.adapter,
                    slots=slots,
                    idle_part=part,
                    base_weight_used=index in self._bypassed,
                    lora=unit.layer.lora,
                )
            )
        return tuple(units)

    def _trainable_bases(self) -> tuple[str, ...]:
        trainable = {}
        for unit in self._units:
            weight = _base_weight(unit)
            if weight is not None and weight.requires_grad:
                trainable[unit.layer.name] = id(weight)
        if not trainable:
            return ()
        shared = self._shared_weights()
        return tuple(name for name, weight in trainable.items() if weight not in shared)

    def _shared_weights(self) -> set[int]:
        """Parameters that also stand somewhere without an adapter (a tied embedding that is meant to train)."""
        under = {id(w) for u in self._inventory.units if (w := _base_weight(u)) is not None}
        bases = {id(u.layer.module.get_base_layer()) for u in self._inventory.units if u.layer.lora}  # type: ignore[operator]
        return {
            id(p)
            for _, root in self._roots
            for m in root.modules()
            if id(m) not in bases
            for p in m._parameters.values()
            if p is not None and id(p) in under
        }

    def _unobservable(self) -> str | None:
        if self._units and all(unit.layer.compiled for unit in self._units) and not self._observer.candidates:
            return "the model is compiled as a whole: its forwards cannot be watched, the gradients decide"
        return None

    def _loss_scale(self, skipped: int) -> float | None:
        # Reading it costs a transfer: asked for only when steps are being skipped.
        return float(self._scaler.get_scale()) if self._scaler is not None and skipped else None

    def _nobody_called(self, facts: Facts) -> bool:
        read = [g for g in facts.gradients if g is not None]
        return (
            bool(read)
            and not any(g.present for g in read)
            and facts.unobservable is None
            and not any(f.holds_expected for f in facts.training_forwards)
        )

    # --- judging, telling, acting -----------------------------------------------------------

    def _judge(self, facts: Facts) -> dict[str, Verdict]:
        verdicts: dict[str, Verdict] = {}
        for check in list(self._checks):
            try:
                verdicts[check.code] = check.judge(facts)
            except Exception as error:
                self._internal(error)
                self._checks.remove(check)
                verdicts[check.code] = Verdict("skipped", f"could not judge: {type(error).__name__} inside the check")
        return explain(verdicts)

    def _note(self, facts: Facts, verdicts: dict[str, Verdict]) -> list[Finding]:
        """Put the verdicts into the report; returns the findings that are new or got worse."""
        state = _state_in_words(facts)
        healthy = not any(v.status == "fail" for v in verdicts.values())
        new = []
        for code, verdict in verdicts.items():
            check = self._by_code[code]
            bad = verdict.status in ("warn", "fail")
            step, framework_step = facts.step, facts.framework_step
            if verdict.of_update and facts.update is not None:
                step, framework_step = facts.update.step, facts.update.framework_step
            key = (code, verdict.cause if bad else "")
            known = self._results.get(key)
            if not bad and known is not None and not _replaces(verdict.status, known.status):
                continue
            evidence = dict(verdict.evidence)
            if bad and (known is None or known.status not in ("warn", "fail")):
                evidence.update(_what_changed(self._baseline, state))
            first = known if known is not None and bad and known.status in ("warn", "fail") else None
            worse = bad and (first is None or (first.status == "warn" and verdict.status == "fail"))
            finding = Finding(
                code=code,
                name=check.name,
                family=check.family,
                status="fail" if first is not None and first.status == "fail" else verdict.status,
                message=verdict.message,
                evidence=evidence if first is None else {**first.evidence, **evidence},
                fix=(verdict.fix or check.fix) if bad else "",
                step=step if first is None else first.step,
                framework_step=framework_step if first is None else first.framework_step,
                last_step=step,
                count=1 if first is None else first.count + 1,
                cause=verdict.cause if bad else "",
            )
            self._results[key] = finding
            if worse:
                new.append(finding)
        self._arrange()
        if healthy and facts.moment == "step" and self._probed:
            self._baseline = state
        return new

    def _arrange(self) -> None:
        """Failures first, nearest cause first; a check that failed is not listed as passed as well."""
        rank = {"fail": 0, "warn": 1, "pass": 2, "pending": 3, "skipped": 4}
        bad = {code for (code, _), f in self._results.items() if f.status in ("fail", "warn")}
        listed = [f for (code, _), f in self._results.items() if f.status in ("fail", "warn") or code not in bad]
        self.report.findings = sorted(listed, key=lambda f: (rank[f.status], f.code))

    def _emit(self, facts: Facts) -> None:
        """Metrics of an update belong to its own step, which lies behind the one being decided."""
        values = metrics_of_step(facts)
        values["lora_probe/healthy"] = float(self.report.healthy is not False)
        values["lora_probe/overhead_ms"] = self._overhead
        if facts.update is not None:
            past = metrics_of_update(facts)
            self.report.metrics.update(past)
            if self._log is not None:
                self._log(past, facts.update.framework_step)
        self.report.metrics.update(values)
        if facts.moment in ("step", "skipped") and self._probed:
            self._probed_before += 1
            if self._log is not None:
                self._log(values, facts.framework_step)
            self._overhead = 0.0

    def _act(self, verdicts: dict[str, Verdict], new: list[Finding], moment: Moment) -> None:
        failing = [f for f in self.report.failures if verdicts.get(f.code, _NOTHING).status == "fail"]
        raising = bool(failing) and self.config.on_failure == "raise" and moment != "exception"
        for finding in new:
            if self._console is not None and not (raising and finding.status == "fail"):
                self._console.print(finding_panel(finding))
        if not failing:
            return
        if self.config.on_failure == "warn" or moment == "exception":
            for finding in new:
                if finding.status == "fail" and moment != "exception":
                    warnings.warn(str(finding), LoraProbeWarning, stacklevel=2)
        elif self.config.on_failure == "stop":
            self.should_stop = True
        else:
            self._error = LoraProbeError(failing)
            raise self._error

    def _reraise(self) -> None:
        """Somebody swallowed our error: the adapter still does not train."""
        if self._error is not None:
            raise LoraProbeError(self._error.findings)

    def _note_on(self, error: BaseException) -> None:
        """Judge the facts at hand and put what fails on the user's own exception."""
        known = {(f.code, f.cause) for f in self.report.failures}
        self._decide("exception", None)
        for finding in self.report.failures:
            if (finding.code, finding.cause) not in known:
                error.add_note(f"lora_probe: {finding}")

    def _finish_report(self) -> None:
        if self._record is not None:
            self._guarded(lambda: self._write_end())
        if self._console is not None:
            self._console.print(health_table(self.report))

    def _write_end(self) -> None:
        if self._record is not None:
            findings = [dataclasses.asdict(f) for f in self.report.findings]
            self._record.write("end", step=self.step, healthy=self.report.healthy, findings=findings)

    def _write_record(self, facts: Facts, verdicts: dict[str, Verdict]) -> None:
        if self._record is not None:
            self._record.write(
                "decision",
                moment=facts.moment,
                step=facts.step,
                framework_step=facts.framework_step,
                verdicts={code: {"status": v.status, "message": v.message} for code, v in verdicts.items()},
                metrics=self.report.metrics,
                gradients={s.name: g.norm for s, g in zip(facts.slots, facts.gradients, strict=False) if g is not None},
                updates=None
                if facts.update is None
                else {s.name: u.size for s, u in zip(facts.slots, facts.update.slots, strict=True) if u is not None},
                state=_state_in_words(facts),
            )

    # --- errors of our own ------------------------------------------------------------------

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """An observer failed: the probe steps aside, says so, and training goes on."""
        if self._broken:
            return
        self._broken = True
        self._internal(error)
        self._observer.disarm()
        self._copies.clear()
        reason = f"could not judge: {type(error).__name__} inside the probe: {error}"
        for check in self._checks:
            key = (check.code, "")
            if key not in self._results or self._results[key].status in ("pending", "skipped"):
                step, number = self.step, self._framework_step()
                self._results[key] = Finding(
                    check.code, check.name, check.family, "skipped", reason, {}, "", step, number, step
                )
        self._arrange()

    def _internal(self, error: BaseException) -> None:
        text = "".join(traceback.format_exception(error))
        if text not in self.report.internal_errors:
            self.report.internal_errors.append(text)
            if self._record is not None:
                self._record.write("error", step=self.step, traceback=text)
            if self._console is not None:
                self._console.print(f"LoRA probe: could not judge, training goes on: {type(error).__name__}: {error}")


_NOTHING = Verdict("pass")


def _replaces(new: str, old: str) -> bool:
    """A verdict that judged is not overwritten by one that could not, nor a lasting reason by a passing one."""
    return new == "pass" or old == "pending" or (old == "skipped" and new == "skipped")


def _base_weight(unit: Unit) -> torch.Tensor | None:
    if not unit.layer.lora:
        return None
    weight = getattr(unit.layer.module.get_base_layer(), "weight", None)  # type: ignore[operator]
    return weight if isinstance(weight, torch.Tensor) else None


def _state_in_words(facts: Facts) -> dict[str, Any]:
    """The few facts that tell what changed when a healthy run becomes unhealthy."""
    forward = facts.training_forwards[0] if facts.training_forwards else None
    modes = forward.modes if forward is not None else facts.modes
    count = {mode: modes.count(mode) for mode in ("active", "inactive", "disabled", "merged")}
    return {
        "step": facts.step,
        "framework_step": facts.framework_step,
        "active_adapters": list(forward.active if forward is not None else facts.active),
        "layers": {mode: n for mode, n in count.items() if n},
        "trainable_tensors": sum(s.requires_grad for s in facts.slots),
        "tensors_in_optimizer": sum(s.owner is not None for s in facts.slots),
        "called_module": forward.module if forward is not None else None,
        "gradients": _gradients_in_words(facts),
    }


def _gradients_in_words(facts: Facts) -> str | None:
    read = [g for g in facts.gradients if g is not None]
    if not read:
        return None
    missing, zero = sum(not g.present for g in read), sum(g.present and g.zero for g in read)
    return f"{len(read) - missing - zero} non-zero, {zero} zero, {missing} None"


def _what_changed(baseline: Mapping[str, Any] | None, state: Mapping[str, Any]) -> dict[str, object]:
    if baseline is None:
        return {}
    changes = [
        f"{key} {baseline[key]!r} -> {state[key]!r}"
        for key in state
        if key not in ("step", "framework_step")
        and None not in (baseline.get(key), state[key])
        and baseline[key] != state[key]
    ]
    return {"last healthy step": baseline["step"], "changed since": "; ".join(changes) or "nothing that is watched"}


def _versions() -> dict[str, str]:
    import importlib.metadata

    names = ("torch", "peft", "transformers", "lightning", "accelerate", "bitsandbytes", "lora_probe_callbacks")
    return {name: importlib.metadata.version(name) for name in names if _installed(name)}


def _installed(name: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
