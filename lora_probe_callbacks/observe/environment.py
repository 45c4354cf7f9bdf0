"""What a run runs on, as one would paste it into an issue: no user name, no host name, no path."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

import torch

__all__ = ["environment"]

_PACKAGES = (
    "lora_probe_callbacks",
    "torch",
    "peft",
    "transformers",
    "lightning",
    "accelerate",
    "trl",
    "bitsandbytes",
)


def environment(devices: Iterable[torch.device] = ()) -> dict[str, object]:
    """Versions, devices, Python and platform.

    Args:
        devices: Devices that are in use; no other one is touched or initialised.

    Returns:
        ``python``, ``platform``, ``versions`` (of what is installed), ``cuda`` (the version torch was
        built for, or None) and ``devices``, each with its name.
    """
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "cuda": torch.version.cuda,
        "devices": [_described(device) for device in dict.fromkeys(devices)],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
