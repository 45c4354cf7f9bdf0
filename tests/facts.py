"""Facts made by hand, for the verdicts that a run shows only indirectly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_probe_callbacks.checks.base import Verdict
from lora_probe_callbacks.checks.catalogue import all_checks, explain
from lora_probe_callbacks.observe.facts import (
    Facts,
    ForwardFact,
    GradientFact,
    Mode,
    SlotFact,
    SlotHistory,
    StepUpdate,
    UnitFact,
    UpdateFact,
)

GRADIENT = GradientFact(present=True, norm=1.0, zero=False, finite=True)
ZERO = GradientFact(present=True, norm=0.0, zero=True, finite=True)
NONE = GradientFact(present=False, norm=0.0, zero=False, finite=True)
MOVED = UpdateFact(start=1.0, moved=1.0, size=0.1, norm=1.1, finite=True)
STILL = UpdateFact(start=1.0, moved=0.0, size=0.0, norm=1.0, finite=True)


def facts(
    *,
    units: int = 2,
    modes: Sequence[Mode] = (),
    gradients: Sequence[GradientFact] = (),
    history: dict[str, Any] | None = None,
    slot: dict[str, Any] | None = None,
    unit: dict[str, Any] | None = None,
    updates: Sequence[UpdateFact] = (),
    called: Sequence[bool] = (),
    **changes: Any,
) -> Facts:
    """A healthy fifth step of an adapter with A and B in each of two layers; arguments change it.

    ``modes`` and ``called`` have an entry a unit; ``gradients`` and ``updates`` one a slot (A, B, A, B).
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
                "learning_rate": 1e-3,
                "weight_decay": 0.0,
                "frozen_by_intent": False,
                "half": False,
                "numel": 32,
                **(slot or {}),
            }
        )
        for u in range(units)
        for role in ("A", "B")
    )
    gradients = tuple(gradients) or (GRADIENT,) * len(slots)
    past = SlotHistory(**{"read": 5, "had_gradient": True, "had_signal": True, "had_rate": True, **(history or {})})
    forward = ForwardFact(
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
    update = StepUpdate(
        step=3,
        framework_step=3,
        slots=tuple(updates) or (MOVED,) * len(slots),
        gradient_norms=tuple(g.norm if g.present else None for g in gradients),
    )
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
        "forwards": (forward,),
        "gradients": gradients,
        "gradients_final": True,
        "update": update,
        "optimizer_tensors": len(slots),
        "optimizers": 1,
        "ever_stepped": True,
    }
    return Facts(**{**values, **changes})


def bad(what: Facts) -> dict[str, Verdict]:
    """What all checks together fail or warn of, consequences left out."""
    verdicts = explain({check.code: check.judge(what) for check in all_checks()})
    return {code: v for code, v in verdicts.items() if v.status in ("fail", "warn")}
