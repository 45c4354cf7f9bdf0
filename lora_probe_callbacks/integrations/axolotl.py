"""The axolotl plugin; installed beside axolotl it is found by its entry point, and ``lora_probe:`` switches it on."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from lora_probe_callbacks.trainer import LoraProbeTrainerCallback

__all__ = ["LoraProbeArgs", "LoraProbePlugin"]


class LoraProbeArgs(BaseModel):
    """The key that is added to axolotl's YAML.

    Attributes:
        lora_probe: True, or keyword arguments of the callback.
    """

    lora_probe: bool | dict[str, Any] | None = None


class LoraProbePlugin(BasePlugin):  # type: ignore[misc]  # axolotl is not there when types are checked
    """Adds the callback to the trainer that axolotl has built."""

    def get_input_args(self) -> str:
        """The class that describes the key, as axolotl wants it."""
        return f"{__name__}.{LoraProbeArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[LoraProbeTrainerCallback]:
        """The callback, if the YAML asks for it.

        Args:
            cfg: The YAML.
            trainer: The trainer.

        Returns:
            Callbacks that axolotl adds.
        """
        asked = cfg.get("lora_probe")
        if not asked:
            return []
        return [LoraProbeTrainerCallback(**({} if asked is True else dict(asked)))]
