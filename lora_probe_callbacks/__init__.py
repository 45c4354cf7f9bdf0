"""Prove, while training runs, that a LoRA adapter is active, reached, owned, moved and seen."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it. Loaded on first use: importing this package must
# load neither lightning nor transformers nor peft nor bitsandbytes.
_PUBLIC: dict[str, str] = {
    "AdapterActivationCallback": "lora_probe_callbacks.lightning",
    "GradientReachabilityCallback": "lora_probe_callbacks.lightning",
    "LoraProbe": "lora_probe_callbacks.lightning",
    "VarianceEstimatorCallback": "lora_probe_callbacks.lightning",
    "WrapperIdentityCallback": "lora_probe_callbacks.lightning",
    "LoraProbeMonitor": "lora_probe_callbacks.monitor",
    "LoraProbeTrainerCallback": "lora_probe_callbacks.trainer",
    "VarianceProbe": "lora_probe_callbacks.estimators.probe",
    "ExampleProbe": "lora_probe_callbacks.estimators.examples",
    "per_example_scores": "lora_probe_callbacks.estimators.in_step",
    "preflight": "lora_probe_callbacks._preflight",
    "verify_serving": "lora_probe_callbacks.serving.verify",
    "Reloaded": "lora_probe_callbacks.serving.targets",
    "Merged": "lora_probe_callbacks.serving.targets",
    "Engine": "lora_probe_callbacks.serving.targets",
    "Endpoint": "lora_probe_callbacks.serving.endpoint",
    "ServingReport": "lora_probe_callbacks.serving.report",
    "ServingResult": "lora_probe_callbacks.serving.report",
    "CannotCompareError": "lora_probe_callbacks.serving.errors",
    "Proof": "lora_probe_callbacks.facts",
    "Finding": "lora_probe_callbacks.report.findings",
    "LoraProbeError": "lora_probe_callbacks.report.findings",
    "LoraProbeWarning": "lora_probe_callbacks.report.findings",
    "ProbeReport": "lora_probe_callbacks.report.report",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
