"""Sequence log-probs, update directions, per-prompt projections and their variance.

Usable by itself: nothing in here needs a callback, a trainer or a probed run.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module that defines it. Loaded on first use: torchmetrics and peft pull transformers.
_PUBLIC: dict[str, str] = {
    "ProjectionComparison": "lora_probe_callbacks.estimators.projections",
    "UpdateDirection": "lora_probe_callbacks.estimators.directions",
    "per_prompt_projection": "lora_probe_callbacks.estimators.projections",
    "project_batches": "lora_probe_callbacks.estimators.projections",
    "verify_projection": "lora_probe_callbacks.estimators.projections",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
