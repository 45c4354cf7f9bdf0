"""Facts made by hand, for the verdicts that a run shows only indirectly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from lora_probe_callbacks.checks._base import Verdict
from lora_probe_callbacks.checks._catalogue import all_checks, explain
from lora_probe_callbacks.facts import (
    EstimatorFact,
    Facts,
    ForwardFact,
    GradientFact,
    Mode,
    OtherAdapter,
    RankReport,
    RanksFact,
    ResumedFact,
    SavedFact,
    SlotFact,
    SlotHistory,
    StepUpdate,
    Sums,
    UnitFact,
    Wrapping,
)
from lora_probe_callbacks.observe.device.gradients import gradient_fact
from lora_probe_callbacks.observe.device.updates import move_fact


class Change(NamedTuple):
    """What one step did to one slot: norm before, fraction of its elements that moved, norms of change and result."""

    start: float
    moved: float
    size: float
    norm: float


NOTHING = Change(*[None] * 4)  # of a slot that no optimizer stepped
GRADIENT = gradient_fact(1.0)
ZERO = gradient_fact(0.0)
NONE = gradient_fact(None)
MOVED = Change(start=1.0, moved=1.0, size=0.1, norm=1.1)
STILL = Change(start=1.0, moved=0.0, size=0.0, norm=1.0)
NORMS = {GRADIENT: 1.0, ZERO: 0.0, NONE: None, gradient_fact(math.inf): math.inf}


def step_update(updates: Sequence[Change | None], gradients: Sequence[float | None]) -> dict[str, Any]:
    """The facts of an update, made in step 3."""
    starts, moved, sizes, norms = (
        map(tuple, zip(*(u or NOTHING for u in updates), strict=True)) if updates else ((),) * 4
    )
    numbers = StepUpdate(3, 3, starts, sizes, norms, moved, tuple(gradients))
    return {"update": numbers, "moves": tuple(map(move_fact, norms, moved))}


def facts(
    *,
    units: int = 2,
    modes: Sequence[Mode] = (),
    gradients: Sequence[GradientFact] = (),
    history: dict[str, Any] | None = None,
    slot: dict[str, Any] | None = None,
    unit: dict[str, Any] | None = None,
    updates: Sequence[Change | None] = (),
    called: Sequence[bool] = (),
    at: Mapping[int, Mapping[str, Any]] | None = None,
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
    slots = tuple(
        SlotFact(
            **{
                "name": f"layer.{u}.lora_{role}",
                "adapter": "default",
                "role": role,
                "unit": u,
                "requires_grad": True,
                "owner": 0,
                "weight_decay": 0.0,
                "frozen_by_intent": False,
                "half": False,
                "numel": 32,
                **{key: value for key, value in (slot or {}).items() if key != "learning_rate"},
            }
        )
        for u in range(units)
        for role in ("A", "B")
    )
    gradients = tuple(gradients) or (GRADIENT,) * len(slots)
    past = SlotHistory(**{"had_gradient": True, "had_signal": True, "had_rate": True, **(history or {})})
    seen = ForwardFact(
        module="model",
        received=True,
        modes=modes,
        active=("default",),
        modes_at_backward=modes,
        active_at_backward=("default",),
        calls=tuple(
            (int(mode == "active"), 1, None if mode == "active" else mode) if c else (0, 0, None)
            for mode, c in zip(modes, called, strict=True)
        ),
        reached=frozenset(i for i, g in enumerate(gradients) if g.present),
        why_unknown=None,
        with_grad=frozenset(u for u, c in enumerate(called) if c),
    )
    norms = tuple(map(NORMS.__getitem__, gradients))
    values = {
        "moment": "step",
        "optimizer": 0,
        "step": 4,
        "framework_step": 4,
        "expected": ("default",),
        "declared": False,
        "slots": slots,
        "units": tuple(
            UnitFact(name=f"layer.{u}", adapter="default", slots=(2 * u, 2 * u + 1), **(unit or {}))
            for u in range(units)
        ),
        "modes": modes,
        "active": ("default",),
        "history": (past,) * len(slots),
        "forwards": (dataclasses.replace(seen, **(forward or {})),),
        "reads": (5,) * len(slots),
        "rates": ((slot or {}).get("learning_rate", 1e-3),) * len(slots),
        "gradients": gradients,
        "gradient_norms": norms,
        "gradients_final": True,
        **step_update(tuple(updates) or (MOVED,) * len(slots), norms),
        "optimizer_tensors": len(slots),
        "optimizers": 1,
        "ever_stepped": True,
    }
    for index, own in (at or {}).items():
        for key, parts in (("slots", values["slots"]), ("history", values["history"])):
            mine = parts[index]._replace(**{k: v for k, v in own.items() if k in parts[index]._fields})
            values[key] = (*parts[:index], mine, *parts[index + 1 :])
        if "learning_rate" in own:
            rates = values["rates"]
            values["rates"] = (*rates[:index], own["learning_rate"], *rates[index + 1 :])
    if "update" in changes and changes["update"] is None:
        values["moves"] = ()
    return Facts(**{**values, **changes})


def other(name: str = "other", **changes: Any) -> OtherAdapter:
    """A second adapter that was used before and stands still now."""
    healthy: dict[str, Any] = {"declared": None, "tensors": 4, "trainable": 0, "owned": 0, "changed": ()}
    healthy |= {"was_active": True, "ever_changed": True, "active_now": False}
    return OtherAdapter(name=name, **{**healthy, **changes})


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
    sent = RanksFact(tuple(reports), 0, equal_at_start, differed_before)
    return {"ranks": sent, "wrapping": WRAPPED, "why_alone": ""}


ALL = frozenset(range(4))


def saved(**changes: Any) -> SavedFact:
    """A file of the adapter that was written in step 3, equal to the live one in all of its four tensors."""
    healthy: dict[str, Any] = {"path": "out/adapter.safetensors", "adapter": "default", "step": 3, "framework_step": 30}
    healthy |= {"slots": ALL, "tensors": 4, "values": "equal"}
    return SavedFact(**{**healthy, **changes})


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
