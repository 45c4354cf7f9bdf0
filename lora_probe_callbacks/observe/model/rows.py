"""What a batch says of its rows, and whether a layer is in the mode that its configuration is made for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from lora_probe_callbacks.observe.model.inventory import Unit

__all__ = ["by_row", "dropout_is_off"]


def by_row(layer: nn.Module) -> tuple[Sequence[str] | None, Sequence[int | None] | None]:
    """Which adapter each row of the present batch is for, and where aLoRA begins in it.

    PEFT hangs both on the layers for the time of one forward of the model, as arguments of a hook (peft 0.21,
    tuners/lora/model.py, ``_enable_peft_forward_hooks``), which runs after the hooks that were there before.

    Args:
        layer: An adapted layer that is about to run.

    Returns:
        ``adapter_names`` and ``alora_offsets``, None where the batch says nothing.
    """
    names, offsets = None, None
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, partial):
            names = hook.keywords.get("adapter_names", names)
            offsets = hook.keywords.get("alora_offsets", offsets)
    return names, offsets


def dropout_is_off(unit: Unit) -> bool:
    """Whether the dropout of a LoRA layer was configured and does not act, as in eval mode."""
    dropouts = unit.layer.module._modules.get("lora_dropout") if unit.layer.lora else None
    dropout = None if dropouts is None else dropouts._modules.get(unit.adapter)
    return isinstance(dropout, nn.Dropout) and dropout.p > 0.0 and not dropout.training
