"""The saves and resumes of one probed run: the session's part that reads files back and remembers what was saved.

A save is announced before its file is complete, so the adapter is sampled at the announcement and the file
is read at the next event. A file may be older than the adapter by then: it is compared with the sample.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_probe_callbacks.facts import ResumedFact, SavedFact
from lora_probe_callbacks.observe.checkpoint.fingerprint import compared, fingerprint
from lora_probe_callbacks.observe.checkpoint.format import (
    ADAPTER_FILES,
    StoredFile,
    StoredTensor,
    UnreadableError,
    read_file,
    sample_of,
    spans,
)
from lora_probe_callbacks.observe.checkpoint.names import (
    AdapterNames,
    adapter_names,
    bare,
    changed_settings,
    full_shape,
    left_out,
)
from lora_probe_callbacks.observe.model.inventory import Unit
from lora_probe_callbacks.observe.model.targets import Scene
from lora_probe_callbacks.observe.model.wrappers import is_shard

__all__ = ["Checkpoints"]

_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
_REMEMBERED = 16  # saves of which the sample is kept: a file may be looked at again later
_UNRELATED = 0.5  # cosine between the A of one run at two times is near 1; of two initialisations near 0
_MOMENT = 0.05  # seconds: clocks of file systems are coarse
_STILL_WRITING = 0.2  # seconds after which a file that nobody writes to has not changed

_AT_A_SAVE = 32  # tensors whose values are compared: half of them always, the others in turn; by hand all

Sample = dict[str, torch.Tensor]


@dataclass(eq=False, slots=True)
class _Announced:
    """A save that was announced, and the adapters as they were then."""

    path: Path
    step: int
    framework_step: int
    live: dict[str, Sample]  # by adapter
    state: tuple[tuple[str, int, int], ...] | None = None  # of the files, when they could not be read


class Checkpoints:
    """Reads back what a run has saved, and compares a resumed run with what was saved of it.

    Args:
        scene: What is expected to train.
        reads: This process reads files (rank 0).
    """

    def __init__(self, scene: Scene, *, reads: bool) -> None:
        self._scene = scene
        self._reads = reads
        self._names: dict[str, AdapterNames] = {}
        self._slots: dict[str, frozenset[int]] = {}
        self._inventory: object = None
        self._pending: list[_Announced] = []
        self._found: list[SavedFact] = []
        self._saved: dict[str, tuple[float, dict[str, Sample]]] = {}  # real path to its time and the sample
        self._previous: dict[str, tuple[Sample, Sample]] = {}  # by adapter: of the last file, and live then
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
                state = _state_of(one.path)
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
                one.state = _state_of(one.path)
            self.look(again=True)
        found, self._found = self._found, []
        return tuple(found)

    def check(self, path: str | os.PathLike[str], step: int, framework_step: int, *, running: bool) -> list[SavedFact]:
        """Compare a file with the adapter as it is now, or as it was when that file was announced.

        Args:
            path: An adapter's folder or file, or a checkpoint.
            step: The present step.
            framework_step: Its number in the framework.
            running: Training goes on: what is found is judged by the next decision as well.

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
            if facts and all(f.values == "equal" for f in facts):
                self._save_of(place, self._live(few=True))
            if any(f.unreadable for f in facts):
                before = _state_of(place)
                time.sleep(_STILL_WRITING)
                if _state_of(place) != before:
                    facts = [replace(f, unreadable=None, why_not="the file is being written") for f in facts]
        facts = [replace(f, final=not running, before_steps=not self.stepped_at) for f in facts]
        if running:
            self._found += facts
        return facts

    # --- resumes ----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """A fingerprint of the adapter, of the optimizer's state and of the base, in plain values."""
        return fingerprint(self._scene)

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
        return compared(state, self._scene, source, whole=whole)

    # --- what is live -----------------------------------------------------------------------

    def _adapters(self) -> dict[str, AdapterNames]:
        """The names of the expected adapters, looked up again when the layers were exchanged."""
        if self._inventory is not self._scene.inventory:
            self._inventory = self._scene.inventory
            by_adapter: dict[str, list[Unit]] = {}
            for unit in self._scene.units:
                by_adapter.setdefault(unit.adapter, []).append(unit)
            self._names = {a: adapter_names(a, units) for a, units in by_adapter.items()}
            index = {id(slot): i for i, slot in enumerate(self._scene.slots)}
            self._slots = {
                a: frozenset(index[id(s)] for u in units for s in u.slots) for a, units in by_adapter.items()
            }
        return self._names

    def _live(self, *, few: bool = False, whole: bool = False) -> dict[str, Sample]:
        """Samples of the adapters by name, under the names of an adapter file and of a whole module."""
        samples = {}
        for adapter, names in self._adapters().items():
            chosen = [*names.full, *(name for name in names.saved if name not in names.slots)]
            if few and len(chosen) > _AT_A_SAVE:
                step = -(-len(chosen) // (_AT_A_SAVE // 2))
                chosen = [*chosen[::step], *chosen[self._turn % (step - 1) + 1 :: step]]
            tensors = {n: t for n in chosen if (t := (names.full.get(n) or names.saved[n])()) is not None}
            tensors = {n: t for n, t in tensors.items() if not is_shard(t) and t.device.type != "meta"}
            sample = sample_of(tensors, whole=whole)
            samples[adapter] = {**sample, **{names.other[n]: v for n, v in sample.items() if n in names.other}}
        return samples

    def _written(self, place: Path) -> float:
        """When the files of the adapters were written, in seconds since the epoch; now, if there is none."""
        times = []
        for adapter in self._adapters():
            with suppress(OSError):
                times.append(_file_of(place, adapter).stat().st_mtime)
        return max(times, default=time.time())

    def _others(self, adapter: str, form: str) -> dict[str, dict[str, torch.Tensor]]:
        """The other adapters of the model under the names that this one has in an adapter file."""
        by_adapter: dict[str, list[Unit]] = {}
        for unit in self._scene.inventory.units:
            if unit.adapter != adapter:
                by_adapter.setdefault(unit.adapter, []).append(unit)
        return {a: adapter_names(a, units).live(form) for a, units in by_adapter.items()} if form == "adapter" else {}

    # --- reading ----------------------------------------------------------------------------

    def _read(
        self,
        place: Path,
        live: Mapping[str, Sample],
        step: int,
        framework_step: int,
        *,
        why_no_values: str | None = None,
        whole: bool = False,
    ) -> list[SavedFact]:
        """One fact for each expected adapter."""
        facts = []
        for adapter, names in self._adapters().items():
            fact = SavedFact(str(place), adapter, step, framework_step, self._slots[adapter])
            try:
                path = _file_of(place, adapter)
                fact = replace(fact, path=str(path))
                stored = read_file(path)
                fact = self._compare(fact, names, stored, live.get(adapter, {}), why_no_values, whole=whole)
            except UnreadableError as error:
                fact = replace(fact, unreadable=str(error))
            except FileNotFoundError:
                fact = replace(fact, why_not=f"no file of weights at {place}")
            except NotImplementedError as error:
                fact = replace(fact, why_not=str(error))
            except Exception as error:
                traceback.clear_frames(error.__traceback__)
                fact = replace(fact, why_not=f"{type(error).__name__}: {error}")
            facts.append(fact)
        if not whole and any(f.why_not is None and f.unreadable is None for f in facts):
            self._save_of(place, live)
        return facts

    def _save_of(self, place: Path, live: Mapping[str, Sample]) -> None:
        """Keep what a file was written from: looked at again, it need not be what is live then."""
        self._saved[os.path.realpath(place)] = (self._written(place), dict(live))
        while len(self._saved) > _REMEMBERED:
            del self._saved[next(iter(self._saved))]

    def _compare(
        self,
        fact: SavedFact,
        names: AdapterNames,
        file: StoredFile,
        live: Sample,
        why_no_values: str | None,
        *,
        whole: bool,
    ) -> SavedFact:
        form, table = _table(file, names)
        expected = names.shapes["adapter" if form == "adapter" else "state"]
        if form == "adapter" and names.why_not:
            return replace(fact, form="adapter", why_not=f"could not compare: {names.why_not}")
        place = file.path.parent
        if form != "adapter" and _is_export(file.path):
            return self._export(fact, names, file, table)
        if form != "adapter" and not _any_of(table, expected):
            return replace(
                fact, form="state", why_not="no tensor of the adapter is in the file, which is not an adapter's"
            )
        at = _matched(expected, table, exact=form == "adapter")
        shapes, empty = [], []
        for name, key in at.items():
            if table[key].shape != expected[name]:
                if 0 in table[key].shape:
                    empty.append(name)
                else:
                    shapes.append((name, str(list(table[key].shape)), str(list(expected[name]))))
        converted = _converted(names, expected, at, table)
        wrapped, foreign = self._strangers(names, table, set(at.values())) if form == "adapter" else ((), ())
        missing = [n for n in expected if n not in at]
        if missing and at:
            tensors = names.live("adapter" if form == "adapter" else "state")
            missing = [n for n in missing if not self._tied(tensors, n, at)]
        fact = replace(
            fact,
            form=form,
            tensors=len(expected),
            missing=tuple(missing),
            empty=tuple(empty),
            wrapped=wrapped,
            foreign=foreign,
            shapes=tuple(shapes),
            converted=converted,
            settings=tuple(changed_settings(names, place)) if form == "adapter" and not converted else (),
        )
        if form == "adapter":
            out = left_out(names, self._scene, table)
            fact = replace(fact, left_out=tuple(out), beside=_beside(file.path) if out else None)  # type: ignore[arg-type]
        if missing or empty or converted or not at:
            return fact
        same_shape = {n: key for n, key in at.items() if n in live and expected[n] == table[key].shape}
        return self._values(fact, names, file, table, same_shape, live, why_no_values, whole=whole)

    def _values(
        self,
        fact: SavedFact,
        names: AdapterNames,
        file: StoredFile,
        table: Mapping[str, StoredTensor],
        at: Mapping[str, str],
        live: Sample,
        why_no_values: str | None,
        *,
        whole: bool,
    ) -> SavedFact:
        by_key = file.samples({key: table[key] for key in at.values()}, whole=whole)
        saved = {n: by_key[key] for n, key in at.items() if key in by_key and n in live}
        saved = {n: v for n, v in saved.items() if len(v) == len(live[n])}
        if not saved and not fact.shapes:
            return replace(fact, why_no_values="no rank holds a whole tensor of it")
        differing = [n for n, v in saved.items() if not _equal(v, live[n])]
        fact = replace(fact, differing=tuple(differing), values="equal" if saved and not differing else None)
        if fact.shapes or differing:
            other = self._whose(fact, names, file, table)
            if other is not None:
                return replace(fact, other=other)
        if not differing:
            if _all_zero(names, saved) and self.moved:
                return replace(fact, values="untrained")
            self._previous[fact.adapter] = (saved, live)
            return fact
        start = self._start.get(fact.adapter, {})
        moved = [n for n in saved if n in start and not _equal_sampled({n: live[n]}, start)]
        apart, cosine = _distance(names, saved, live)
        previous = self._previous.get(fact.adapter)
        right = [n for n in moved if n not in differing]
        values: Any = "related"
        if not all(bool(v.double().isfinite().all()) for n, v in saved.items() if live[n].double().isfinite().all()):
            values = "not finite"
        elif _all_zero(names, live) and not self.moved:
            values = "fresh"
        elif _all_zero(names, saved):
            values = "untrained"
        elif (moved and 4 * len(right) >= len(moved)) or (not moved and len(differing) < len(saved)):
            values = "partly"
        elif _equal_sampled(saved, start):
            values = "start"
        elif cosine < _UNRELATED:
            values = "unrelated"
        elif previous is not None and _same(saved, previous[0]) and not _same(live, previous[1]):
            values = "previous"
        self._previous[fact.adapter] = (saved, live)
        if why_no_values is not None and values not in ("not finite", "partly", "unrelated", "untrained"):
            return replace(fact, differing=(), why_no_values=why_no_values)
        return replace(fact, values=values, apart=apart)

    def _whose(
        self, fact: SavedFact, names: AdapterNames, file: StoredFile, table: Mapping[str, StoredTensor]
    ) -> str | None:
        """The other adapter that the file holds."""
        for other, tensors in self._others(fact.adapter, fact.form).items():
            at = _matched(tensors, table, exact=True)
            if not at or len(at) < len(tensors) or any(full_shape(tensors[n]) != table[k].shape for n, k in at.items()):
                continue
            saved = file.samples({k: table[k] for k in at.values()})
            live = sample_of({n: t for n, t in tensors.items() if not is_shard(t)})
            if live and all(_equal(saved[at[n]], v) for n, v in live.items() if at[n] in saved):
                return other
        return None

    def _strangers(
        self, names: AdapterNames, table: Mapping[str, StoredTensor], used: set[str]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names in an adapter file that carry a wrapper's name, and those that stand for nothing in the model."""
        rest = [key for key in table if key not in used]
        wrapped = tuple(key for key in table if bare(key) != key)
        if not rest or names.top is None:
            return wrapped, ()
        known = {bare(n) for n, _ in names.top.named_parameters(remove_duplicate=False)}
        known |= {bare(n) for n, _ in names.top.named_buffers(remove_duplicate=False)}
        known |= {n.replace(".base_layer.", ".") for n in known} | {n.replace(".original_module.", ".") for n in known}
        known |= {f"base_model.model.{n}" for n in known}
        return wrapped, tuple(key for key in rest if key not in wrapped and key not in known | names.made)

    @staticmethod
    def _tied(live: Mapping[str, torch.Tensor], name: str, at: Mapping[str, str]) -> bool:
        """The same storage stands in the file under another name."""
        tensor = live.get(name)
        return tensor is not None and any(n in live and _shares(live[n], tensor) for n in at)

    def _export(
        self, fact: SavedFact, names: AdapterNames, file: StoredFile, table: Mapping[str, StoredTensor]
    ) -> SavedFact:
        """A whole model that ``from_pretrained`` will read: merged, or under names that it does not know?"""
        adapter_parts = tuple(key for key in table if ".base_layer." in key or ".lora_" in key)
        if adapter_parts:
            return replace(fact, form="model", wrapped=adapter_parts)
        same, seen = 0, 0
        for unit in names.units:
            weight = unit.layer.base_weight
            key = _plain(unit, table)
            if weight is None or key is None or unit.layer.merged or is_shard(weight):
                continue
            if table[key].shape != tuple(weight.shape):
                continue
            saved = file.samples({key: table[key]})
            seen += 1
            same += key in saved and _equal(saved[key], sample_of({key: weight})[key])
        if (
            seen
            and same == seen
            and any(bool(t.detach().any()) for n, t in names.live("state").items() if names.role(n) == "B")
        ):
            return replace(fact, form="model", values="base")
        return replace(
            fact, form="model", why_not="it holds a whole model, merged: the adapter in it cannot be told apart"
        )


# --- files --------------------------------------------------------------------------------------


def _file_of(place: Path, adapter: str) -> Path:
    """The file in which an adapter would be looked for."""
    if not place.is_dir():
        return place
    for folder in (place / adapter, place):
        for name in ADAPTER_FILES:
            if (folder / name).is_file():
                return folder / name
    for name in (*_MODEL_FILES, "checkpoint.ckpt"):
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(place)


def _files_below(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        return []
    return sorted(f for pattern in ("*.*", "*/adapter_model.*") for f in place.glob(pattern) if f.is_file())


def _state_of(place: Path) -> tuple[tuple[str, int, int], ...]:
    """Sizes and times: does anybody still write?"""
    found = []
    for file in _files_below(place):
        try:
            stat = file.stat()
        except OSError:
            continue
        found.append((str(file), stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def _is_export(path: Path) -> bool:
    """A folder of a whole model for ``from_pretrained``, not of a training run's state."""
    folder = path.parent
    return path.name in _MODEL_FILES and (folder / "config.json").is_file()


def _beside(path: Path) -> str | None:
    """Another file of weights that the user may have written for what the adapter file does not take."""
    for file in sorted(path.parent.iterdir()):
        training = file.name.startswith(
            ("optimizer", "scheduler", "rng_state", "random_states", "training_args", "scaler")
        )
        if file != path and file.suffix in (".safetensors", ".bin", ".pt", ".pth") and not training:
            return file.name
    return None


def _table(file: StoredFile, names: AdapterNames) -> tuple[Any, dict[str, StoredTensor]]:
    """The table of a file that holds most of an adapter, and in which form."""
    best: tuple[int, Any, dict[str, StoredTensor]] | None = None
    if file.path.name in ADAPTER_FILES:
        return "adapter", max(file.tables.values(), key=len, default={})
    state, saved = names.full, names.saved
    for place, table in file.tables.items():
        if place.startswith(("optimizer", "callbacks", "loops", "lr_schedulers")):
            continue
        as_saved = len(_matched(saved, table, exact=True))
        as_state = len(_matched(state, table, exact=False))
        form = "adapter" if as_saved >= as_state else "state"
        if best is None or max(as_saved, as_state) > best[0]:
            best = (max(as_saved, as_state), form, table)
    if best is None:
        return "adapter", {}
    if not best[0]:  # nothing fits: an adapter's file has nothing else in it
        return ("adapter" if best[2] and all("lora_" in key for key in best[2]) else "state"), best[2]
    return best[1], best[2]


def _any_of(table: Mapping[str, StoredTensor], expected: Iterable[str]) -> bool:
    tails = {name.rpartition("lora_")[2] for name in expected}
    return any(key.rpartition("lora_")[2] in tails and "lora_" in key for key in table) or bool(
        _matched(expected, table, exact=False)
    )


def _matched(expected: Iterable[str], table: Mapping[str, StoredTensor], *, exact: bool) -> dict[str, str]:
    """Find the names of live tensors in a file.

    The state of a whole module is restored into a module that is wrapped alike, so wrappers' names do not
    count there, nor does how far up the module stands that was saved. In an adapter file they do count, but
    for one thing: a tensor is there, under a wrong name, which is told apart from one that is not there.

    Args:
        expected: Live names.
        table: The tensors of the file.
        exact: It is an adapter file.

    Returns:
        Live name to the name in the file, for those that are there.
    """
    by_bare = {bare(key): key for key in table}
    names = list(expected)
    if exact or not names:
        return {name: by_bare[name] for name in names if name in by_bare}
    found: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            tail = ".".join(parts[start:])
            if len(parts) - start < min(len(parts), 3):
                break
            if tail in by_bare:
                found[name] = by_bare[tail]
                break
    if found:
        return found
    first = names[0]
    longer = next((key for key in by_bare if key.endswith(f".{first}")), None)
    if longer is None:
        return {}
    prefix = longer[: -len(first)]
    return {name: by_bare[prefix + name] for name in names if prefix + name in by_bare}


def _plain(unit: Unit, table: Mapping[str, StoredTensor]) -> str | None:
    """The name of an adapted weight in a model that was never adapted."""
    parts = f"{bare(unit.layer.name)}.weight".split(".")
    return next((tail for i in range(len(parts)) if (tail := ".".join(parts[i:])) in table), None)


# --- values -------------------------------------------------------------------------------------


def _converted(
    names: AdapterNames,
    expected: Mapping[str, tuple[int, ...]],
    at: Mapping[str, str],
    table: Mapping[str, StoredTensor],
) -> bool:
    """Every A and B has twice the rank, where the adapter was made by a method that changes the base."""
    init = str(getattr(names.config, "init_lora_weights", "")).lower()
    if not init.startswith(("pissa", "olora", "corda", "lora_ga")):
        return False
    for name, key in at.items():
        shape, role = list(expected[name]), names.role(name)
        if role in ("A", "B"):
            axis = 0 if role == "A" else 1
            shape[axis] *= 2
        if list(table[key].shape) != shape:
            return False
    return bool(at)


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() == b.numel() > 0 and a.data_ptr() == b.data_ptr() != 0


def _equal(saved: torch.Tensor, live: torch.Tensor) -> bool:
    """Equal once the live values are rounded to the type of the file: a copy in 16 bits is a copy."""
    cast = live.to(saved.dtype)
    return torch.equal(saved, cast) or torch.allclose(saved.double(), cast.double(), rtol=0, atol=0, equal_nan=True)


def _same(a: Sample, b: Sample) -> bool:
    common = a.keys() & b.keys()
    return bool(common) and all(torch.equal(a[n], b[n]) for n in common)


def _equal_sampled(saved: Sample, start: Sample) -> bool:
    """Compare with a sample taken at the start, where all elements or the same few are at hand."""
    for name, values in saved.items():
        if name not in start:
            return False
        few = start[name]
        if len(values) != len(few):
            chosen = spans(len(values))
            values = torch.cat([values[a:b] for a, b in chosen]) if chosen else values
        if len(values) != len(few) or not _equal(values, few):
            return False
    return bool(saved)


def _all_zero(names: AdapterNames, saved: Sample) -> bool:
    b = [v for n, v in saved.items() if names.role(n) == "B"]
    return bool(b) and not any(bool(v.any()) for v in b)


def _distance(names: AdapterNames, saved: Sample, live: Sample) -> tuple[float, float]:
    """The relative distance of all tensors, and the cosine between those of A (of all, if there is none)."""
    a = [n for n in saved if names.role(n) == "A"] or list(saved)
    everything = _flat(saved, saved), _flat(live, saved)
    x, y = _flat(saved, a), _flat(live, a)
    size = float(everything[1].norm())
    apart = float((everything[0] - everything[1]).norm()) / size if size else float("inf")
    norm = float(x.norm() * y.norm())
    return apart, float(x @ y) / norm if norm else 0.0


def _flat(sample: Sample, names: Iterable[str]) -> torch.Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(sample[n].double() for n in names)])
