"""What the trials are made of: tiny models, losses, and one run with a fault in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH = 64, 12


@dataclass
class Trial:
    """A run with one fault in it.

    Attributes:
        model: What is trained.
        optimizer: What steps it; AdamW over what requires gradients, if nothing else is said.
        loss: Of one batch, given the model, the token ids and the number of the step.
        between: Called before every step with its number.
        intent: What is declared to the probe.
        begins: The step in which the fault takes effect.
        scaler: A gradient scaler for the loop.
        around: Entered around the whole loop.
        set_to_none: How gradients are cleared.
    """

    model: nn.Module
    optimizer: Optimizer | None = None
    loss: Callable[[Any, Tensor, int], Tensor] = lambda model, ids, step: next_token_loss(model, ids)
    between: Callable[[int], None] = lambda step: None
    intent: dict[str, Any] = field(default_factory=dict)
    begins: int = 0
    scaler: torch.amp.GradScaler | None = None
    around: AbstractContextManager[Any] = field(default_factory=nullcontext)
    set_to_none: bool = True


def tiny_llama(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)  # type: ignore[arg-type]


def lora_config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes})


def lora_model(base: Any = None, *, hook: bool = False, **changes: Any) -> PeftModel:
    model = get_peft_model(tiny_llama() if base is None else base, lora_config(**changes))
    return hooked(model) if hook else model


def hooked(model: PeftModel) -> PeftModel:
    """As gradient checkpointing does: the inputs require gradients, and nothing raises any more."""
    model.enable_input_require_grads()
    return model


def with_second(name: str, **changes: Any) -> PeftModel:
    model = lora_model(**changes)
    model.add_adapter(name, lora_config(**changes))
    return model


def adamw(model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.01) -> Optimizer:
    return AdamW([{"params": [p for p in model.parameters() if p.requires_grad]}], lr=lr, weight_decay=weight_decay)


def adapter_tensors(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if "lora_" in n]


def next_token_loss(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def squares(model: Any, ids: Tensor, step: int) -> Tensor:
    output: Tensor = model(ids.float() / VOCABULARY)
    return output.pow(2).mean()


def preference(policy: Tensor, reference: Tensor) -> Tensor:
    return -F.logsigmoid(0.1 * (reference - policy))


def against_disabled(model: Any, ids: Tensor, step: int) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        reference = next_token_loss(model, ids)
    return preference(next_token_loss(model, ids), reference)


def at_step(step: int, act: Callable[[], object]) -> Callable[[int], None]:
    def between(now: int) -> None:
        if now == step:
            act()

    return between


class Block(nn.Module):
    """Two linear layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(LENGTH, 16)
        self.second = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.first(x)
        return self.second(hidden)  # type: ignore[no-any-return]


class Normed(nn.Module):
    """Two linear layers with batch normalisation in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(LENGTH, 16)
        self.norm = nn.BatchNorm1d(16)
        self.second = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.first(x))
        return self.second(hidden)  # type: ignore[no-any-return]


class Tower(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.q_proj(x)
        return hidden.relu()


class Towers(nn.Module):
    """A vision tower on data and a language model on what it makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.language = Tower(LENGTH, 16), Tower(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.vision(x)
        return self.language(hidden)  # type: ignore[no-any-return]


class Holder(nn.Module):
    """A module that holds a base model when its optimizer is built."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama()
