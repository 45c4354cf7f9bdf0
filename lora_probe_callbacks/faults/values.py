"""What writes to the adapter, to its copies or to the base beside the optimizer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_probe_callbacks.faults._fault import fault


@fault("R01", "LP409", "PKU-YuanGroup/Open-Sora-Plan#186", "atomistic-machine-learning/schnetpack#785", by_step=4)
@torch.no_grad()
def average_left_in_place(model: nn.Module, average: Mapping[str, Tensor]) -> None:
    """Copy averaged weights into the model for a validation, and never put the trained ones back.

    The average lags far behind, so that nearly all of every stretch of training is lost. LP409 reports the second time.

    Args:
        model: A model with an adapter.
        average: Name of a parameter to its average.
    """
    for name, tensor in model.named_parameters():
        if name in average:
            tensor.copy_(average[name])


@fault("R02", "LP409", "MakazhanAlpamys/Soup#693", by_step=4)
@torch.no_grad()
def restarted_without_merging(model: nn.Module) -> None:
    """Begin with a new adapter, as ReLoRA does, and forget to merge the old one into the base.

    LP409 reports the second restart.

    Args:
        model: A model with LoRA layers.
    """
    for name, tensor in model.named_parameters():
        if "lora_A" in name:
            nn.init.kaiming_uniform_(tensor, a=5**0.5)
        elif "lora_B" in name:
            tensor.zero_()


@fault("R03", "LP808", "huggingface/peft#1732")
def norms_left_in_training_mode(model: nn.Module) -> None:
    """Let the frozen norms of the base follow the batches, as ``model.train()`` does.

    Their running statistics are in no adapter file: what reloads is another model. LP808 warns of it at step 0, and
    ``check_saved`` fails.

    Args:
        model: A model with batch normalisation.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()


@fault("R04", "LP408", "AndreasBergmeister/ram#6", by_step=4)
@torch.no_grad()
def averaged_in_another_order(model: nn.Module, source: str, lagged: str, decay: float = 0.99) -> None:
    """Move a lagged adapter towards another one whose tensors are taken in another order.

    Equal shapes raise nothing. A stand-in: the report is of averages that never arrive. Call it after every step; LP408
    reports it after four, given ``lagged_adapters=(lagged,)``.

    Args:
        model: A model with both adapters, in which every shape is there twice at least.
        source: The adapter that trains.
        lagged: The adapter that should follow it.
        decay: Of the average.
    """
    tensors = dict(model.named_parameters())
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if f".{source}." in name:
            by_shape.setdefault(tensor.shape, []).append(tensor)
    for name, tensor in tensors.items():
        if f".{lagged}." in name:
            tensor.lerp_(by_shape[tensor.shape].pop(), 1 - decay)  # from the last to the first
