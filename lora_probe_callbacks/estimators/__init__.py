"""Sequence log-probs, update directions, per-prompt projections and their variance.

Usable by itself: nothing in here needs a callback, a trainer or a probed run.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module that defines it. Loaded on first use: torchmetrics and peft pull transformers.
_PUBLIC: dict[str, str] = {
    "ConditionalMoments": "lora_probe_callbacks.estimators.moments",
    "ConditionalVariance": "lora_probe_callbacks.estimators.moments",
    "Estimate": "lora_probe_callbacks.estimators.probe",
    "ExampleProbe": "lora_probe_callbacks.estimators.examples",
    "ExampleScores": "lora_probe_callbacks.estimators.in_step",
    "ProjectionComparison": "lora_probe_callbacks.estimators.projections",
    "PromptBatch": "lora_probe_callbacks.estimators.batches",
    "SignSequence": "lora_probe_callbacks.estimators.intervals",
    "Spread": "lora_probe_callbacks.estimators.intervals",
    "TwoWayVariance": "lora_probe_callbacks.estimators.variance",
    "UpdateDirection": "lora_probe_callbacks.estimators.directions",
    "VarianceProbe": "lora_probe_callbacks.estimators.probe",
    "conditional_variance": "lora_probe_callbacks.estimators.variance",
    "entropy_surrogate": "lora_probe_callbacks.estimators.surrogates",
    "first_order_change": "lora_probe_callbacks.estimators.variance",
    "nll": "lora_probe_callbacks.estimators.surrogates",
    "per_example_scores": "lora_probe_callbacks.estimators.in_step",
    "per_prompt_projection": "lora_probe_callbacks.estimators.projections",
    "policy_gradient_surrogate": "lora_probe_callbacks.estimators.surrogates",
    "project_batches": "lora_probe_callbacks.estimators.projections",
    "refuse_shared_prompts": "lora_probe_callbacks.estimators.batches",
    "sequence_logprobs": "lora_probe_callbacks.estimators.logprobs",
    "skewed_interval": "lora_probe_callbacks.estimators.intervals",
    "spread": "lora_probe_callbacks.estimators.intervals",
    "t_interval": "lora_probe_callbacks.estimators.variance",
    "u_statistic_variance": "lora_probe_callbacks.estimators.variance",
    "verify_projection": "lora_probe_callbacks.estimators.projections",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
