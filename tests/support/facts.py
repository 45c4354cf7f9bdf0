"""Facts made by hand, for the verdicts that a run shows only indirectly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_probe_callbacks.checks._base import Verdict
from lora_probe_callbacks.checks._catalogue import all_checks, explain
from lora_probe_callbacks.checks.checkpoints._saves import Values
from lora_probe_callbacks.facts import (
    Calls,
    Coverage,
    EstimatorFact,
    Facts,
    ForwardFact,
    Gradients,
    History,
    Mode,
    OtherAdapter,
    Path,
    RankReport,
    RanksFact,
    ResumedFact,
    SavedFact,
    Slots,
    Sums,
    UnitFact,
    Update,
    Wrapping,
)


class Change(NamedTuple):
    """What one step did to one slot: norm before, fraction of its elements that moved, norms of change and result."""

    start: float
    moved: float
    size: float
    norm: float


NOTHING = Change(*[math.nan] * 4)  # of a slot that no optimizer stepped
GRADIENT, ZERO, NONE, INFINITE, UNREAD = 1.0, 0.0, "none", math.inf, None  # norms of gradients, and what else may be
MOVED = Change(start=1.0, moved=1.0, size=0.1, norm=1.1)
STILL = Change(start=1.0, moved=0.0, size=0.0, norm=1.0)


def step_update(updates: Sequence[Change | None], gradients: Sequence[float | str | None]) -> dict[str, Any]:
    """The facts of an update, made in step 3."""
    rows = np.array([u or NOTHING for u in updates], np.float64).reshape(-1, 4)
    received = np.array([g if isinstance(g, float) else math.nan for g in gradients] if len(rows) else [], np.float64)
    there = np.array([isinstance(g, float) for g in gradients] if len(rows) else [], np.bool_)
    start, moved, size, norm = rows.T
    return {"update": Update(3, 3, ~np.isnan(start), start, size, norm, moved, there, received)}


def read_gradients(gradients: Sequence[float | str | None]) -> Gradients:
    """A norm for each slot, "none" where there is no gradient, None where it was not looked at."""
    norm = np.array([g if isinstance(g, float) else math.nan for g in gradients], np.float64)
    read = np.array([g is not UNREAD for g in gradients], np.bool_)
    return Gradients(read, norm, np.array([isinstance(g, float) for g in gradients], np.bool_))


def facts(
    *,
    units: int = 2,
    modes: Sequence[Mode] = (),
    gradients: Sequence[float | str | None] = (),
    history: dict[str, Any] | None = None,
    slot: dict[str, Any] | None = None,
    unit: dict[str, Any] | None = None,
    updates: Sequence[Change | None] = (),
    called: Sequence[bool] = (),
    at: Mapping[int, Mapping[str, Any]] | None = None,
    reads: Sequence[int] = (),
    forward: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Facts:
    """A healthy fifth step of an adapter with A and B in each of two layers; arguments change it.

    ``modes`` and ``called`` have an entry a unit; ``gradients`` and ``updates`` one a slot (A, B, A, B).
    ``history``, ``slot`` (and its ``learning_rate``) and ``unit`` hold for all; ``at`` changes them for single slots,
    ``forward`` the one forward.
    """
    modes = tuple(modes) or ("active",) * units
    called = tuple(called) or (True,) * units
    size = 2 * units
    gradients = tuple(gradients) or (GRADIENT,) * size
    plain = {"requires_grad": True, "owner": 0, "learning_rate": 1e-3, "weight_decay": 0.0, "half": False, "numel": 32}
    plain |= {"frozen_by_intent": False, "adapter": "default", "part": "", "name": None, "role": None}
    past = dict.fromkeys(History.__dataclass_fields__, 0) | {"reads": 5}
    past |= {"had_gradient": True, "had_signal": True, "had_rate": True, **(history or {})}
    own: list[dict[str, Any]] = [{**plain, **(slot or {}), **past, **(at or {}).get(i, {})} for i in range(size)]
    for mine, number in zip(own, reads, strict=False):
        mine["reads"] = number
    seen = ForwardFact(
        module="model",
        received=True,
        modes=modes,
        active=("default",),
        modes_at_backward=modes,
        active_at_backward=("default",),
        calls=Calls(
            active=np.array([c and mode == "active" for mode, c in zip(modes, called, strict=True)], np.int64),
            total=np.array(called, np.int64),
            odd={u: mode for u, (mode, c) in enumerate(zip(modes, called, strict=True)) if c and mode != "active"},
        ),
        reached=frozenset(i for i, g in enumerate(gradients) if isinstance(g, float)),
        why_unknown=None,
        with_grad=frozenset(u for u, c in enumerate(called) if c),
    )
    values = {
        "moment": "step",
        "optimizer": 0,
        "step": 4,
        "framework_step": 4,
        "expected": ("default",),
        "declared": False,
        "slots": _slots(units, own),
        "units": tuple(
            UnitFact(name=f"layer.{u}", adapter="default", slots=(2 * u, 2 * u + 1), **(unit or {}))
            for u in range(units)
        ),
        "modes": modes,
        "active": ("default",),
        "history": _history(own),
        "path": Path.empty(size),
        "forwards": (dataclasses.replace(seen, **(forward or {})),),
        "gradients": read_gradients(gradients),
        "gradients_final": True,
        **step_update(tuple(updates) or (MOVED,) * size, gradients),
        "optimizer_tensors": size,
        "optimizers": 1,
        "ever_stepped": True,
    }
    return Facts(**{**values, **changes})


def _slots(units: int, own: Sequence[dict[str, Any]]) -> Slots:
    def column(name: str, kind: Any, absent: Any = None) -> Any:
        return np.array([absent if o[name] is None else o[name] for o in own], kind)

    roles = [o["role"] or "AB"[i % 2] for i, o in enumerate(own)]
    return Slots(
        name=tuple(o["name"] or f"layer.{i // 2}.lora_{'AB'[i % 2]}" for i, o in enumerate(own)),
        adapter=tuple(o["adapter"] for o in own),
        part=tuple(o["part"] for o in own),
        role=np.array(roles, "<U5"),
        unit=np.repeat(np.arange(units), 2),
        frozen_by_intent=column("frozen_by_intent", np.bool_),
        requires_grad=column("requires_grad", np.bool_),
        owner=column("owner", np.int64, -1),
        rate=column("learning_rate", np.float64, math.nan),
        weight_decay=column("weight_decay", np.float64, math.nan),
        half=column("half", np.bool_),
        numel=column("numel", np.int64),
    )


def _history(own: Sequence[dict[str, Any]]) -> History:
    empty = History.empty(len(own))
    columns = {name: np.array([o[name] for o in own], getattr(empty, name).dtype) for name in vars(empty)}
    return History(**columns)


def unread(what: Facts) -> Facts:
    """The same, but that no gradient was looked at."""
    return dataclasses.replace(what, gradients=Gradients.unread(len(what.slots)))


def with_slots(what: Facts, **columns: Any) -> Facts:
    """The same with other columns."""
    return dataclasses.replace(what, slots=dataclasses.replace(what.slots, **columns))


def received(what: Facts, *norms: float | None) -> Facts:
    """The same with other gradients as the optimizer received them."""
    assert what.update is not None
    gradient_norm = np.array([math.nan if norm is None else norm for norm in norms])
    return dataclasses.replace(
        what,
        update=dataclasses.replace(
            what.update, gradient_norm=gradient_norm, received=np.array([norm is not None for norm in norms])
        ),
    )


def other(name: str = "other", **changes: Any) -> OtherAdapter:
    """A second adapter that was used before and stands still now."""
    healthy: dict[str, Any] = {"declared": None, "tensors": 4, "trainable": 0, "owned": 0, "changed": ()}
    healthy |= {"was_active": True, "ever_changed": True, "active_now": False}
    return OtherAdapter(name=name, **{**healthy, **changes})


def covered(**changes: Any) -> Facts:
    """A healthy step of a model of which it is known what the configuration asks for; arguments change that."""
    return facts(coverage=Coverage(**changes))


def estimator(**changes: Any) -> EstimatorFact:
    """A healthy look at an estimator ``S`` in the fifth step: all tensors reached, direction and gradients given."""
    what = facts()
    healthy: dict[str, Any] = {"name": "S", "step": 4, "framework_step": 40, "forwards": what.forwards}
    healthy |= {"modes": what.modes, "active": what.active, "graph": True, "reached": frozenset(range(4))}
    healthy |= {"direction": frozenset(range(4)), "missing": frozenset()}
    return EstimatorFact(**{**healthy, **changes})


WRAPPED = Wrapping("DistributedDataParallel", 0, entered=True, synced=True, hook=False, unmanaged=(), whole=4)
SAME = (1.0, 0.5, 2.0, 1.0, 0.5, 2.0, 0.0, 0.0, 0.0)
OTHER = (1.1, 0.5, 2.0, 1.0, 0.5, 2.0, 0.0, 0.0, 0.0)  # 5 % of the norm apart


def ranks(
    *,
    tensors: bool = True,
    gradients: bool = True,
    equal_at_start: bool = True,
    differed_before: bool = False,
    **own: Any,
) -> dict[str, Any]:
    """What two ranks have sent, as changes for :func:`facts`.

    Args:
        tensors: They hold equal tensors.
        gradients: And equal gradients.
        equal_at_start: See ``RanksFact``.
        differed_before: See ``RanksFact``.
        **own: Changes of both reports.
    """
    healthy: dict[str, Any] = {"moment": "step", "step": 4, "broken": False, "bad": (), "first": 0, "whole": 4}
    healthy |= {"unmanaged": 0, "final": True, "bypassed": False, "unsynced": False, "hook": False}
    healthy |= {"tensors": SAME, "gradients": SAME, "shards": Sums()}
    reports = [RankReport(**{**healthy, **own}) for _ in range(2)]
    reports[1] = dataclasses.replace(
        reports[1],
        tensors=reports[1].tensors if tensors else OTHER,
        gradients=reports[1].gradients if gradients else OTHER,
    )
    codes = tuple(code for code, _ in own.get("bad", ()))
    sent = RanksFact(tuple(reports), 0, equal_at_start, differed_before, failed=codes, found=codes)
    return {"ranks": sent, "wrapping": WRAPPED, "why_alone": ""}


ALL = frozenset(range(4))


def saved(*, values: Values | None = "equal", **changes: Any) -> SavedFact:
    """A file of the adapter that was written in step 3, equal to the live one in all of its four tensors."""
    healthy: dict[str, Any] = {"path": "out/adapter.safetensors", "adapter": "default", "step": 3, "framework_step": 30}
    healthy |= {"slots": ALL, "tensors": 4}
    if values is not None:
        healthy |= {"compared": 4, "differing": () if values == "equal" else tuple("abcd")}
    signs: dict[Values | None, dict[str, Any]] = {
        "untrained": {"zero_b": True, "b_moved": True},
        "start": {"like_start": True},
        "previous": {"like_previous": True},
        "partly": {"differing": ("a", "b")},
        "unrelated": {"cosine": 0.0},
        "fresh": {"live_zero_b": True},
        "not finite": {"not_finite": 1},
    }
    return SavedFact(**{**healthy, **signs.get(values, {}), **changes})


def resumed(**changes: Any) -> ResumedFact:
    """A run that goes on from a checkpoint, with the adapter, the optimizer's state and the base that were saved."""
    healthy: dict[str, Any] = {"source": "last.ckpt", "whole": True, "known": ALL, "optimizer": ALL, "base": 0.0}
    return ResumedFact(**{**healthy, "base_layer": "layer.0", **changes})


def reached_estimator(**changes: Any) -> EstimatorFact:
    """A look at an estimator that reaches all tensors, and of whose gradients nothing is known."""
    right: ForwardFact = facts().forwards[0]
    healthy = {
        "name": "S",
        "step": 4,
        "framework_step": 4,
        "forwards": (right,),
        "modes": ("active", "active"),
        "active": ("default",),
        "graph": True,
        "reached": ALL,
        "direction": ALL,
    }
    return EstimatorFact(**{**healthy, **changes})


def expect(
    verdict: Verdict,
    status: str,
    *words: str,
    slots: Collection[int] = (),
    got: str | None = None,
    expected: str | None = None,
    cause: str = "",
    fix: str = "",
    of_update: bool = False,
    seen: tuple[int, int] | None = None,
) -> None:
    """Compare a verdict as a whole: all that is not given must be empty."""
    assert verdict.status == status, verdict
    assert bool(verdict.message) == (status != "pass"), verdict
    for word in words:
        assert word in verdict.message, verdict.message
    assert verdict.evidence == ({} if got is None else {"got": got, "expected": expected}), verdict.evidence
    assert verdict.slots == frozenset(slots), verdict.slots
    assert verdict.cause == cause
    assert fix in verdict.fix, verdict.fix
    assert bool(verdict.fix) == bool(fix), verdict.fix
    assert verdict.of_update is of_update
    assert verdict.seen == seen


def bad(what: Facts) -> dict[str, Verdict]:
    """What all checks together fail or warn of, consequences left out."""
    verdicts = explain({check.code: check.judge(what) for check in all_checks()})
    return {code: v for code, v in verdicts.items() if v.status in ("fail", "warn")}
