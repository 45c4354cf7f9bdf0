"""Estimators of what one update changes: log-probs, surrogates, directions, projections, variance."""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module that defines it. Loaded on first use: torchmetrics and peft pull transformers.
_PUBLIC: dict[str, str] = {
    "ConditionalMoments": "lora_probe_callbacks.estimators.variance",
    "ConditionalVariance": "lora_probe_callbacks.estimators.variance",
    "PromptBatch": "lora_probe_callbacks.estimators.batches",
    "TwoWayVariance": "lora_probe_callbacks.estimators.variance",
    "conditional_variance": "lora_probe_callbacks.estimators.variance",
    "entropy_surrogate": "lora_probe_callbacks.estimators.surrogates",
    "first_order_change": "lora_probe_callbacks.estimators.variance",
    "nll": "lora_probe_callbacks.estimators.surrogates",
    "policy_gradient_surrogate": "lora_probe_callbacks.estimators.surrogates",
    "refuse_shared_prompts": "lora_probe_callbacks.estimators.batches",
    "sequence_logprobs": "lora_probe_callbacks.estimators.logprobs",
    "t_interval": "lora_probe_callbacks.estimators.variance",
    "u_statistic_variance": "lora_probe_callbacks.estimators.variance",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
