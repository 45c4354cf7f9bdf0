"""A model whose adapter has an effect, and engines that do with it what engines do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from support.tiny import VOCABULARY, peft_llama
from torch import nn

from lora_probe_callbacks import Engine
from lora_probe_callbacks.serving.scoring import Rows, score

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(std: float = 0.3, seed: int = 1, base: nn.Module | None = None, **config: Any) -> PeftModel:
    """A tiny Llama with a B that is not zero."""
    torch.manual_seed(0)
    model = peft_llama(base, **({"target_modules": ALL} | config))
    set_b(model, std, seed)
    return model.eval()


def set_b(model: nn.Module, std: float, seed: int, adapter: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and f".{adapter}." in name:
            parameter.data = std * torch.randn(parameter.shape, generator=generator)


def tokens(sequences: int = 40, length: int = 32) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(3))


def engine(served: nn.Module, base: nn.Module, noise: float = 0.0) -> Engine:
    """One that scores with two models, and rounds as one in 16 bits does."""
    generator = torch.Generator().manual_seed(4)

    def scores(rows: Rows, adapter: bool) -> list[Any]:
        found = score(served if adapter else base, rows)
        drawn = [noise * torch.randn(len(row), generator=generator, dtype=torch.float64).numpy() for row in found]
        return [(row + more).clip(max=0.0) for row, more in zip(found, drawn, strict=True)]

    return Engine(scores)


def scaled(model: PeftModel, factor: Callable[[str], float]) -> PeftModel:
    """A copy whose layers apply the adapter as often as is said of their names."""
    changed = copy.deepcopy(model)
    for name, module in changed.named_modules():
        if isinstance(module, LoraLayer):
            module.scaling = {key: value * factor(name) for key, value in module.scaling.items()}
    return changed
