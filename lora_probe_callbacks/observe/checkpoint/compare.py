"""One file compared with an adapter as it was sampled: names, shapes and values, in counts and distances.

What they mean is judged by the checks (``checks/checkpoints``).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_probe_callbacks.facts import SavedFact
from lora_probe_callbacks.observe.checkpoint.format import (
    Elements,
    StoredFile,
    StoredTensor,
    UnreadableError,
    file_of,
    is_export,
    read_file,
    sample_of,
    spans,
    weights_beside,
)
from lora_probe_callbacks.observe.checkpoint.names import (
    AdapterNames,
    adapter_names,
    bare,
    changed_settings,
    full_shape,
    holds_any,
    left_out,
    matched,
    plain_name,
    strangers,
    table_of,
)
from lora_probe_callbacks.observe.model.inventory import Unit
from lora_probe_callbacks.observe.model.targets import Targets
from lora_probe_callbacks.observe.model.wrappers import is_shard

__all__ = ["Known", "read_back", "sampled"]

_AT_A_SAVE = 32  # tensors whose values are compared: half of them always, the others in turn; by hand all


@dataclass(frozen=True, eq=False, slots=True)
class Known:
    """What is known of one adapter when a file of it is compared.

    Attributes:
        live: Its elements as they were when the file was written.
        start: Likewise when training began.
        previous: The elements of the file before this one, and the live ones then; None for the first.
        b_moved: Some B was moved by a step.
        why_no_values: Why the file need not hold the live values; None if it must.
        whole: The live elements are all there are, not a few of each tensor.
        unsaved: Name and relative change of what training has moved beside the adapter.
    """

    live: Elements
    start: Elements
    previous: tuple[Elements, Elements] | None
    b_moved: bool
    why_no_values: str | None = None
    whole: bool = False
    unsaved: tuple[tuple[str, float], ...] = ()


def sampled(names: AdapterNames, *, turn: int | None = None, whole: bool = False) -> Elements:
    """Elements of an adapter as it is now, under the names of an adapter file and of a whole module.

    Args:
        names: Its names.
        turn: Take a part of its tensors, another one at every turn; None: all.
        whole: Take all elements of each, not a few.

    Returns:
        Name to [elements]; tensors of which this rank holds a shard are left out.
    """
    chosen = [*names.full, *(name for name in names.saved if name not in names.slots)]
    if turn is not None and len(chosen) > _AT_A_SAVE:
        step = -(-len(chosen) // (_AT_A_SAVE // 2))
        chosen = [*chosen[::step], *chosen[turn % (step - 1) + 1 :: step]]
    tensors = {n: t for n in chosen if (t := (names.full.get(n) or names.saved[n])()) is not None}
    tensors = {n: t for n, t in tensors.items() if not is_shard(t) and t.device.type != "meta"}
    sample = sample_of(tensors, whole=whole)
    return {**sample, **{names.other[n]: v for n, v in sample.items() if n in names.other}}


def read_back(
    fact: SavedFact, place: Path, names: AdapterNames, targets: Targets, known: Known
) -> tuple[SavedFact, Elements | None]:
    """Read the file of one adapter and compare it.

    Args:
        fact: Which adapter, and when; the rest is filled in.
        place: A file, or a folder that somebody saved into.
        names: The adapter.
        targets: Everything around it.
        known: What it is compared with.

    Returns:
        The fact, and the elements that the next file of this adapter may repeat; None where there are none.
    """
    try:
        path = file_of(place, names.adapter)
        fact = replace(fact, path=str(path))
        return _compare(fact, read_file(path), names, targets, known)
    except UnreadableError as error:
        return replace(fact, unreadable=str(error)), None
    except FileNotFoundError:
        return replace(fact, why_not=f"no file of weights at {place}"), None
    except NotImplementedError as error:
        return replace(fact, why_not=str(error)), None
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        return replace(fact, why_not=f"{type(error).__name__}: {error}"), None


def _compare(
    fact: SavedFact, file: StoredFile, names: AdapterNames, targets: Targets, known: Known
) -> tuple[SavedFact, Elements | None]:
    form, table = table_of(file, names)
    expected = names.shapes[form]
    if form == "adapter":
        if names.why_not:
            return replace(fact, why_not=f"could not compare: {names.why_not}"), None
    elif is_export(file.path):
        return _export(fact, names, file, table), None
    elif not holds_any(table, expected):
        why_not = "no tensor of the adapter is in the file, which is not an adapter's"
        return replace(fact, form="state", why_not=why_not), None
    at = matched(expected, table, exact=form == "adapter")
    fact = _in_shape(replace(fact, form=form, tensors=len(expected)), names, table, at)
    if form == "adapter":
        fact = _beside(fact, file, names, targets, table, at, known.unsaved)
    if fact.missing or fact.empty or fact.converted or not at:
        return fact, None
    same_shape = {n: key for n, key in at.items() if n in known.live and expected[n] == table[key].shape}
    return _values(fact, file, table, same_shape, names, targets, known)


# --- names and shapes ---------------------------------------------------------------------------


def _in_shape(
    fact: SavedFact, names: AdapterNames, table: Mapping[str, StoredTensor], at: Mapping[str, str]
) -> SavedFact:
    """What is not in the file, or in another shape."""
    expected = names.shapes[fact.form]
    other = [n for n, key in at.items() if table[key].shape != expected[n]]
    empty = [n for n in other if 0 in table[at[n]].shape]
    shapes = [(n, str(list(table[at[n]].shape)), str(list(expected[n]))) for n in other if n not in empty]
    missing = [n for n in expected if n not in at]
    if missing and at:
        live = names.live(fact.form)
        missing = [n for n in missing if not _tied(live, n, at)]
    converted = _converted(names, expected, at, table)
    return replace(fact, missing=tuple(missing), empty=tuple(empty), shapes=tuple(shapes), converted=converted)


def _tied(live: Mapping[str, torch.Tensor], name: str, at: Mapping[str, str]) -> bool:
    """The same storage stands in the file under another name."""
    tensor = live.get(name)
    return tensor is not None and any(n in live and _shares(live[n], tensor) for n in at)


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() == b.numel() > 0 and a.data_ptr() == b.data_ptr() != 0


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


def _beside(
    fact: SavedFact,
    file: StoredFile,
    names: AdapterNames,
    targets: Targets,
    table: Mapping[str, StoredTensor],
    at: Mapping[str, str],
    unsaved: tuple[tuple[str, float], ...],
) -> SavedFact:
    """What an adapter file holds besides, leaves out and says in its configuration."""
    wrapped, foreign = strangers(names, table, set(at.values()))
    settings = () if fact.converted else tuple(changed_settings(names, file.path.parent))
    out = tuple(left_out(names, targets, table))
    in_file = {bare(key) for key in table}
    unsaved = tuple((name, change) for name, change in unsaved if bare(name) not in in_file)
    beside = weights_beside(file.path) if out or unsaved else None
    return replace(
        fact, wrapped=wrapped, foreign=foreign, settings=settings, left_out=out, unsaved=unsaved, beside=beside
    )


# --- values -------------------------------------------------------------------------------------


def _values(
    fact: SavedFact,
    file: StoredFile,
    table: Mapping[str, StoredTensor],
    at: Mapping[str, str],
    names: AdapterNames,
    targets: Targets,
    known: Known,
) -> tuple[SavedFact, Elements | None]:
    by_key = file.samples({key: table[key] for key in at.values()}, whole=known.whole)
    live = known.live
    saved = {n: by_key[key] for n, key in at.items() if key in by_key and len(by_key[key]) == len(live[n])}
    if not saved and not fact.shapes:
        return replace(fact, why_no_values="no rank holds a whole tensor of it"), None
    differing = tuple(n for n, v in saved.items() if not _equal(v, live[n]))
    rounded = _rounded(saved, live, differing) if differing else ""
    differing = () if rounded else differing
    zero_b = _all_zero(names, saved)
    fact = replace(
        fact, compared=len(saved), differing=differing, rounded=rounded, zero_b=zero_b, b_moved=known.b_moved
    )
    if fact.shapes or differing:
        other = _whose(fact, file, table, targets)
        if other is not None:
            return replace(fact, other=other), None
    if differing:
        return _apart(fact, names, saved, known), saved
    return fact, None if zero_b and known.b_moved else saved


def _apart(fact: SavedFact, names: AdapterNames, saved: Elements, known: Known) -> SavedFact:
    """How far the values of a file are from the live ones, and where else they may come from."""
    live, start, previous = known.live, known.start, known.previous
    moved = [n for n in saved if n in start and not _equal_sampled({n: live[n]}, start)]
    apart, cosine = _distance(names, saved, live)
    return replace(
        fact,
        why_no_values=known.why_no_values,
        live_zero_b=_all_zero(names, live),
        not_finite=sum(_finite(live[n]) and not _finite(v) for n, v in saved.items()),
        moved=len(moved),
        moved_right=len(set(moved) - set(fact.differing)),
        like_start=_equal_sampled(saved, start),
        like_previous=previous is not None and _same(saved, previous[0]) and not _same(live, previous[1]),
        apart=apart,
        cosine=cosine,
        near=_near(saved, live, apart),
        farthest=tuple(_farthest(saved, live, fact.differing)),
    )


def _whose(fact: SavedFact, file: StoredFile, table: Mapping[str, StoredTensor], targets: Targets) -> str | None:
    """The other adapter that the file holds: in an adapter file all have the same names."""
    by_adapter: dict[str, list[Unit]] = {}
    for unit in targets.inventory.units if fact.form == "adapter" else ():
        if unit.adapter != fact.adapter:
            by_adapter.setdefault(unit.adapter, []).append(unit)
    for other, units in by_adapter.items():
        tensors = adapter_names(other, units).live("adapter")
        at = matched(tensors, table, exact=True)
        if not at or len(at) < len(tensors) or any(full_shape(tensors[n]) != table[k].shape for n, k in at.items()):
            continue
        saved = file.samples({k: table[k] for k in at.values()})
        live = sample_of({n: t for n, t in tensors.items() if not is_shard(t)})
        if live and all(_equal(saved[at[n]], v) for n, v in live.items() if at[n] in saved):
            return other
    return None


def _export(fact: SavedFact, names: AdapterNames, file: StoredFile, table: Mapping[str, StoredTensor]) -> SavedFact:
    """A whole model that ``from_pretrained`` will read: merged, the base alone, or under names that it ignores."""
    fact = replace(fact, form="model")
    adapter_parts = tuple(key for key in table if ".base_layer." in key or ".lora_" in key)
    if adapter_parts:
        return replace(fact, wrapped=adapter_parts)
    same = [equal for unit in names.units if (equal := _holds_base(unit, file, table)) is not None]
    b = (t for n, t in names.live("state").items() if names.role(n) == "B")
    if same and all(same) and any(bool(t.detach().any()) for t in b):
        return fact
    return replace(fact, why_not="it holds a whole model, merged: the adapter in it cannot be told apart")


def _holds_base(unit: Unit, file: StoredFile, table: Mapping[str, StoredTensor]) -> bool | None:
    """Whether the adapted weight in a file is the base's; None where that is not known."""
    weight, key = unit.layer.base_weight, plain_name(unit, table)
    if weight is None or key is None or unit.layer.merged or is_shard(weight):
        return None
    if table[key].shape != tuple(weight.shape):
        return None
    saved = file.samples({key: table[key]})
    return key in saved and _equal(saved[key], sample_of({key: weight})[key])


def _equal(saved: torch.Tensor, live: torch.Tensor) -> bool:
    """Equal once the live values are rounded to the type of the file: a copy in 16 bits is a copy."""
    cast = live.to(saved.dtype)
    return torch.equal(saved, cast) or torch.allclose(saved.double(), cast.double(), rtol=0, atol=0, equal_nan=True)


_SHORT = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_NOISE = 1e-6  # relative: float32 that was added to and subtracted from


def _rounded(saved: Elements, live: Elements, names: Iterable[str]) -> str:
    """The 16-bit type through which all of these values went; a file may be wider than what was written to it."""
    for name, short in _SHORT.items():
        if all(torch.equal(saved[n], live[n].to(short).to(saved[n].dtype)) for n in names):
            return name
    return ""


def _near(saved: Elements, live: Elements, apart: float) -> str:
    """What may explain values that are not the live ones."""
    if apart <= _NOISE:
        return "the rounding of an addition"
    for name, short in _SHORT.items():
        step = 2 * torch.finfo(short).eps
        if all(
            torch.equal(v, v.to(short).to(v.dtype))
            and bool(((v.double() - live[n].double()).abs() <= step * live[n].double().abs() + 1e-7).all())
            for n, v in saved.items()
        ):
            return f"another rounding to {name}"
    return ""


def _farthest(saved: Elements, live: Elements, names: Iterable[str], most: int = 3) -> list[tuple[str, float]]:
    found = []
    for n in names:
        size = float(live[n].double().norm())
        distance = float((saved[n].double() - live[n].double()).norm())
        found.append((n, distance / size if size else float("inf")))
    return sorted(found, key=lambda pair: -pair[1])[:most]


def _same(a: Elements, b: Elements) -> bool:
    common = a.keys() & b.keys()
    return bool(common) and all(torch.equal(a[n], b[n]) for n in common)


def _equal_sampled(saved: Elements, start: Elements) -> bool:
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


def _all_zero(names: AdapterNames, saved: Elements) -> bool:
    b = [v for n, v in saved.items() if names.role(n) == "B"]
    return bool(b) and not any(bool(v.any()) for v in b)


def _distance(names: AdapterNames, saved: Elements, live: Elements) -> tuple[float, float]:
    """The relative distance of all tensors, and the cosine between those of A (of all, if there is none)."""
    a = [n for n in saved if names.role(n) == "A"] or list(saved)
    everything = _flat(saved, saved), _flat(live, saved)
    x, y = _flat(saved, a), _flat(live, a)
    size = float(everything[1].norm())
    apart = float((everything[0] - everything[1]).norm()) / size if size else float("inf")
    norm = float(x.norm() * y.norm())
    return apart, float(x @ y) / norm if norm else 0.0


def _flat(sample: Elements, names: Iterable[str]) -> torch.Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(sample[n].double() for n in names)])


def _finite(values: torch.Tensor) -> bool:
    return bool(values.double().isfinite().all())
