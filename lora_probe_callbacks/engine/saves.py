"""The saves and resumes of one probed run: the session's part that reads files back and remembers what was saved.

A save is announced before its file is complete, so the adapter is sampled at the announcement and the file
is read at the next event. A file may be older than the adapter by then: it is compared with the sample.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_probe_callbacks.facts import ResumedFact, SavedFact
from lora_probe_callbacks.observe.checkpoint.compare import Known, read_back, sampled
from lora_probe_callbacks.observe.checkpoint.fingerprint import compared, fingerprint
from lora_probe_callbacks.observe.checkpoint.format import Elements, file_of, state_of
from lora_probe_callbacks.observe.checkpoint.names import AdapterNames, adapter_names
from lora_probe_callbacks.observe.device.frozen_state import FrozenState
from lora_probe_callbacks.observe.model.inventory import Unit
from lora_probe_callbacks.observe.model.targets import Targets

__all__ = ["Checkpoints"]

_REMEMBERED = 16  # saves of which the sample is kept: a file may be looked at again later
_MOMENT = 0.05  # seconds: clocks of file systems are coarse
_STILL_WRITING = 0.2  # seconds after which a file that nobody writes to has not changed

Live = dict[str, Elements]  # by adapter


@dataclass(eq=False, slots=True)
class _Announced:
    """A save that was announced, and the adapters as they were then."""

    path: Path
    step: int
    framework_step: int
    live: Live
    state: tuple[tuple[str, int, int], ...] | None = None  # of the files, when they could not be read


class Checkpoints:
    """Reads back what a run has saved, and compares a resumed run with what was saved of it.

    Args:
        targets: What is expected to train.
        reads: This process reads files (rank 0).
        frozen_state: What training moves beside the adapter.
    """

    def __init__(self, targets: Targets, *, reads: bool, frozen_state: FrozenState) -> None:
        self._targets = targets
        self._frozen_state = frozen_state
        self._reads = reads
        self._names: dict[str, AdapterNames] = {}
        self._slots: dict[str, frozenset[int]] = {}
        self._inventory: object = None
        self._pending: list[_Announced] = []
        self._found: list[SavedFact] = []
        self._saved: dict[str, tuple[float, Live]] = {}  # real path to its time and the sample
        self._previous: dict[str, tuple[Elements, Elements]] = {}  # by adapter: of the last file, and live then
        self._restored: tuple[Mapping[str, Any], str, bool] | None = None
        self.stepped_at = 0.0  # seconds since the epoch, of the last optimizer step
        self.moved = False  # some B was moved by a step
        self._turn = 0
        self._start = self._live() if reads else {}

    # --- saves ------------------------------------------------------------------------------

    def announced(self, path: str | os.PathLike[str], step: int, framework_step: int) -> None:
        """Take a sample of the adapters, as they are being saved.

        Args:
            path: The file or folder that is being written.
            step: The present step.
            framework_step: Its number in the framework.
        """
        if self._reads:
            self._turn += 1
            self._pending.append(_Announced(Path(path), step, framework_step, self._live(few=True)))
            del self._pending[:-_REMEMBERED]

    @property
    def to_compare(self) -> bool:
        """A saved state was restored and not compared yet."""
        return self._restored is not None

    def look(self, *, again: bool = False) -> None:
        """Read what has been announced, now that it is written.

        Args:
            again: Look again at what could not be read the first time: it may be written by another thread.
        """
        pending, self._pending = self._pending, []
        for one in pending:
            if one.state is not None and not again:
                self._pending.append(one)
                continue
            facts = self._read(one.path, one.live, one.step, one.framework_step)
            if any(f.unreadable or f.why_not for f in facts):
                state = state_of(one.path)
                if one.state != state:  # at the first look, or somebody writes
                    one.state = state
                    self._pending.append(one)
                    continue
            self._found += facts

    def take(self, *, again: bool = False, end: bool = False) -> tuple[SavedFact, ...]:
        """What was found since the last decision.

        Args:
            again: See :meth:`look`.
            end: The run is over: nothing is put off any more.

        Returns:
            One fact for each file and adapter.
        """
        self.look(again=again or end)
        if end and self._pending:
            for one in self._pending:
                one.state = state_of(one.path)
            self.look(again=True)
        found, self._found = self._found, []
        return tuple(found)

    def check(
        self, path: str | os.PathLike[str], step: int, framework_step: int, *, running: bool, asked: bool = False
    ) -> list[SavedFact]:
        """Compare a file with the adapter as it is now, or as it was when that file was announced.

        Args:
            path: An adapter's folder or file, or a checkpoint.
            step: The present step.
            framework_step: Its number in the framework.
            running: Training goes on: what is found is judged by the next decision as well.
            asked: A user wants to know whether this is the adapter; what is near it concerns nobody else.

        Returns:
            One fact for each file and adapter.
        """
        place = Path(path)
        self._pending = [p for p in self._pending if p.path != place]
        known = self._saved.get(os.path.realpath(place))
        written = self._written(place)
        if known is not None and abs(known[0] - written) < 1e-6:
            facts = self._read(place, known[1], step, framework_step)
        else:
            why = None
            if written < self.stepped_at - _MOMENT:
                why = "the file is older than the last step: the adapter has moved since"
            facts = self._read(place, self._live(whole=True), step, framework_step, why_no_values=why, whole=True)
            if facts and all(f.as_live for f in facts):
                self._save_of(place, self._live(few=True))
            if any(f.unreadable for f in facts):
                before = state_of(place)
                time.sleep(_STILL_WRITING)
                if state_of(place) != before:
                    facts = [replace(f, unreadable=None, why_not="the file is being written") for f in facts]
        facts = [replace(f, final=not running, before_steps=not self.stepped_at) for f in facts]
        if running:
            self._found += facts
        return [replace(f, asked=asked) for f in facts]

    # --- resumes ----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """A fingerprint of the adapter, of the optimizer's state and of the base, in plain values."""
        return fingerprint(self._targets)

    def restored(self, state: Mapping[str, Any], source: str, *, whole: bool) -> None:
        """Take a saved fingerprint; the next decision compares.

        Args:
            state: What :meth:`state` returned when it was saved.
            source: Where it comes from.
            whole: The optimizer is restored together with it.
        """
        self._restored = (state, source, whole)

    def resumed(self) -> ResumedFact | None:
        """The comparison of a restored run, once."""
        if self._restored is None:
            return None
        (state, source, whole), self._restored = self._restored, None
        return compared(state, self._targets, source, whole=whole)

    # --- what is live -----------------------------------------------------------------------

    def _adapters(self) -> dict[str, AdapterNames]:
        """The names of the expected adapters, looked up again when the layers were exchanged."""
        if self._inventory is not self._targets.inventory:
            self._inventory = self._targets.inventory
            by_adapter: dict[str, list[Unit]] = {}
            for unit in self._targets.units:
                by_adapter.setdefault(unit.adapter, []).append(unit)
            self._names = {a: adapter_names(a, units) for a, units in by_adapter.items()}
            index = {id(slot): i for i, slot in enumerate(self._targets.slots)}
            self._slots = {
                a: frozenset(index[id(s)] for u in units for s in u.slots) for a, units in by_adapter.items()
            }
        return self._names

    def _live(self, *, few: bool = False, whole: bool = False) -> Live:
        """Samples of the expected adapters, of a part of their tensors or of all their elements."""
        turn = self._turn if few else None
        return {a: sampled(names, turn=turn, whole=whole) for a, names in self._adapters().items()}

    def _written(self, place: Path) -> float:
        """When the files of the adapters were written, in seconds since the epoch; now, if there is none."""
        times = []
        for adapter in self._adapters():
            with suppress(OSError):
                times.append(file_of(place, adapter).stat().st_mtime)
        return max(times, default=time.time())

    # --- reading ----------------------------------------------------------------------------

    def _read(
        self,
        place: Path,
        live: Live,
        step: int,
        framework_step: int,
        *,
        why_no_values: str | None = None,
        whole: bool = False,
    ) -> list[SavedFact]:
        """One fact for each expected adapter."""
        facts = []
        unsaved = self._frozen_state.now() if whole else self._frozen_state.moved
        for adapter, names in self._adapters().items():
            mine, start = live.get(adapter, {}), self._start.get(adapter, {})
            known = Known(mine, start, self._previous.get(adapter), self.moved, why_no_values, whole, unsaved)
            fact = SavedFact(str(place), adapter, step, framework_step, self._slots[adapter])
            fact, saved = read_back(fact, place, names, self._targets, known)
            if saved is not None:
                self._previous[adapter] = (saved, mine)
            facts.append(fact)
        if not whole and any(f.why_not is None and f.unreadable is None for f in facts):
            self._save_of(place, live)
        return facts

    def _save_of(self, place: Path, live: Live) -> None:
        """Keep what a file was written from: looked at again, it need not be what is live then."""
        self._saved[os.path.realpath(place)] = (self._written(place), dict(live))
        while len(self._saved) > _REMEMBERED:
            del self._saved[next(iter(self._saved))]
