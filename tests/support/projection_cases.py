"""Tiny real models and per-example losses, shared by the tests of directions and projections."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 32
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

LossFunction = Callable[[nn.Module], torch.Tensor]


class Case(NamedTuple):
    model: nn.Module
    loss_fn: LossFunction


def base_language_model(kind: str, attention: str = "eager", **changes: Any) -> nn.Module:
    shared: dict[str, Any] = {"attn_implementation": attention, **changes}
    if kind == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**(GPT2_SIZES | dropout | shared)))
    if kind == "gemma":
        return GemmaForCausalLM(GemmaConfig(**(SIZES | {"head_dim": 8} | shared)))
    configs: dict[str, Any] = {
        "llama": (LlamaForCausalLM, LlamaConfig),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config),
        "mistral": (MistralForCausalLM, MistralConfig),
    }
    model, config = configs[kind]
    return model(config(**(SIZES | shared)))


def lora(model: nn.Module, **changes: Any) -> PeftModel:
    """Random A and B: with B = 0 half of every derivative would be zero."""
    options: dict[str, Any] = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, **changes}
    with warnings.catch_warnings():
        # Advice on merging, tied weights and fan_in_fan_out, which peft corrects by itself.
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return peft_model


def quantised(model: nn.Module, kind: str) -> nn.Module:
    """Every Linear but the head in bitsandbytes' nf4 or int8, as `from_pretrained` would load it."""
    import bitsandbytes as bnb

    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or path == "lm_head":
            continue
        shape = (module.in_features, module.out_features)
        new: nn.Module
        if kind == "nf4":
            new = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to("cpu")
        else:
            new = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            new = new.to("cpu")
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    loaded: Any = model
    loaded.is_loaded_in_4bit, loaded.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    return model


def tokens(examples: int = 4, length: int = 7, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (examples, length), generator=generator)


def language_loss(ids: torch.Tensor, responses: int = 1) -> LossFunction:
    """L_n: the mean negative log-likelihood over the tokens of a prompt's responses."""

    def loss_fn(model: nn.Module) -> torch.Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return -logp.sum(-1).view(-1, responses).mean(-1)

    return loss_fn


def language_case(
    kind: str = "llama", dtype: torch.dtype = torch.float64, attention: str = "eager", **lora_changes: Any
) -> Case:
    torch.manual_seed(0)
    lora_changes.setdefault("target_modules", "all-linear")
    lora_changes.setdefault("task_type", "CAUSAL_LM")
    model = lora(base_language_model(kind, attention), **lora_changes).to(dtype)
    return Case(model, language_loss(tokens()))


def bert_case(dtype: torch.dtype = torch.float64, **lora_changes: Any) -> Case:
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, **dropout, max_position_embeddings=16, num_labels=3)
    lora_changes.setdefault("target_modules", ["query", "value", "dense"])
    model = lora(BertForSequenceClassification(config), task_type="SEQ_CLS", **lora_changes).to(dtype)
    ids, labels = tokens(), torch.tensor([0, 2, 1, 1])

    def loss_fn(model: nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(input_ids=ids).logits, labels, reduction="none")

    return Case(model, loss_fn)


class SmallConvNet(nn.Module):
    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(6) if batch_norm else nn.GroupNorm(2, 6)
        self.second = nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(images)).tanh()
        return self.head(self.second(hidden).tanh().mean((-1, -2)))


def conv_case(dtype: torch.dtype = torch.float64, batch_norm: bool = False, **lora_changes: Any) -> Case:
    torch.manual_seed(0)
    lora_changes.setdefault("target_modules", ["first", "second"])
    lora_changes.setdefault("modules_to_save", ["head"])
    model = lora(SmallConvNet(batch_norm), **lora_changes).to(dtype)
    images, labels = torch.randn(4, 2, 9, 9, dtype=dtype), torch.tensor([0, 2, 1, 1])

    def loss_fn(model: nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(images), labels, reduction="none")

    return Case(model, loss_fn)


def random_direction(model: nn.Module, scale: float = 1.0, seed: int = 3) -> dict[str, torch.Tensor]:
    """A tensor for every trainable parameter: no term of the derivative is left out."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
