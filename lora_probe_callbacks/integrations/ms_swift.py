"""The callback under the name ``lora_probe`` in ms-swift's ``--callbacks``."""

from __future__ import annotations

from typing import Any

from swift.callbacks import callbacks_map

from lora_probe_callbacks.trainer import LoraProbeTrainerCallback

__all__ = ["register"]


def register(**intent: Any) -> None:
    """Make ``--callbacks lora_probe`` known; call it in a file that is given as ``--external_plugins``.

    Args:
        **intent: As for :class:`~lora_probe_callbacks.trainer.LoraProbeTrainerCallback`.
    """
    callbacks_map["lora_probe"] = lambda args, trainer: LoraProbeTrainerCallback(**intent)
