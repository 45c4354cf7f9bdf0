"""What differs between the releases of PEFT that are supported, in one place."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["frozen_weight_names"]


def frozen_weight_names(layer: BaseTunerLayer) -> Mapping[str, Collection[str]]:
    """The parts that PEFT freezes by design: MiCA's ``lora_B``. Before 0.19.1 it had neither MiCA nor the attribute.

    Args:
        layer: An adapted layer.

    Returns:
        Adapter to the names of its frozen parts.
    """
    names: Mapping[str, Collection[str]] = getattr(layer, "frozen_peft_weight_names", {})
    return names
