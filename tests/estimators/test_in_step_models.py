"""Scores of a training step against a backward for each example, model by model and variant by variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig
from support.in_step_cases import agrees_with_loop
from support.projection_cases import (
    ATTENTION_AND_MLP,
    Case,
    base_language_model,
    bert_case,
    conv_case,
    language_case,
    language_loss,
    lora,
    quantised,
    tokens,
)
from torch import nn

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma", "mistral"])
def test_language_models(kind: str, attention: str, dtype: torch.dtype) -> None:
    agrees_with_loop(language_case(kind, dtype, attention), TOLERANCE[dtype])


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "rank_pattern": {"rank_pattern": {"q_proj": 5, "down_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "lora_bias": {"lora_bias": True},
    "base_bias": {"bias": "lora_only", "kind": "qwen2"},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "dora_dropout": {"use_dora": True, "lora_dropout": 0.3},
    "dora_bias": {"use_dora": True, "kind": "qwen2"},
    "dora_conv1d": {"use_dora": True, "kind": "gpt2", "target_modules": ["c_attn", "c_proj", "c_fc"]},
    "modules_to_save_head": {"modules_to_save": ["lm_head"], "target_modules": ATTENTION_AND_MLP},
    "modules_to_save_norm": {"modules_to_save": ["norm", "input_layernorm"]},
    "modules_to_save_gemma_norm": {"modules_to_save": ["norm"], "kind": "gemma"},
    "modules_to_save_layer_norm": {"modules_to_save": ["ln_f", "ln_1"], "kind": "gpt2"},
    "modules_to_save_conv1d": {"modules_to_save": ["c_proj"], "target_modules": ["c_attn"], "kind": "gpt2"},
    "modules_to_save_embedding": {"modules_to_save": ["embed_tokens"]},
    "modules_to_save_scaled_embedding": {"modules_to_save": ["embed_tokens"], "kind": "gemma"},
    "embedding_lora": {"target_modules": [*ATTENTION_AND_MLP, "embed_tokens", "lm_head"]},
    "embedding_lora_scaled": {"target_modules": ["embed_tokens", "q_proj"], "kind": "gemma"},
    "lm_head_lora": {"target_modules": [*ATTENTION_AND_MLP, "lm_head"]},
    "mica": {"init_lora_weights": "mica", "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, dtype: torch.dtype) -> None:
    # Gemma's norm multiplies in float32 whatever the model's type (transformers 5.23).
    tolerance = max(TOLERANCE[dtype], 1e-7) if "gemma_norm" in variant else TOLERANCE[dtype]
    agrees_with_loop(language_case(dtype=dtype, **VARIANTS[variant]), tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_bert(dtype: torch.dtype) -> None:
    agrees_with_loop(bert_case(dtype), TOLERANCE[dtype])


def test_bert_with_its_embeddings_and_classifier() -> None:
    case = bert_case(target_modules=["query", "word_embeddings"], modules_to_save=["classifier", "LayerNorm"])
    agrees_with_loop(case, 1e-10)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}, {"lora_dropout": 0.4}], ids=str)
def test_convolutions(options: dict[str, Any]) -> None:
    agrees_with_loop(conv_case(**options), 1e-10)


def test_convolution_saved_as_a_whole() -> None:
    case = conv_case(target_modules=["second"], modules_to_save=["first", "norm", "head"])
    agrees_with_loop(case, 1e-10)


def test_batch_norm_in_eval_mode_is_like_any_layer() -> None:
    case = conv_case(batch_norm=True)
    case.model.eval()
    agrees_with_loop(case, 1e-10)


def test_several_active_adapters() -> None:
    case = language_case()
    model: Any = case.model
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.double().base_model.set_adapter(["default", "second"])
    agrees_with_loop(case, 1e-10)


@pytest.mark.parametrize("per_token", [False, True])
def test_several_responses_to_a_prompt(per_token: bool) -> None:
    case = language_case()
    loss_fn = language_loss(tokens(6), responses=3)
    rows = torch.arange(2).repeat_interleave(3)
    agrees_with_loop(Case(case.model, loss_fn), 1e-10, example_of_row=rows, per_token=per_token)


def packed_case(**options: Any) -> tuple[Case, torch.Tensor]:
    """Three sequences in one row, apart by position ids and a block-diagonal mask."""
    case = language_case(**options)
    lengths = torch.tensor([5, 3, 6])
    example = torch.arange(3).repeat_interleave(lengths)
    ids = tokens(1, int(lengths.sum()))
    positions = torch.cat([torch.arange(int(length)) for length in lengths])[None]
    visible = (example[:, None] == example[None]).tril()
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)[None, None]

    def loss_fn(model: nn.Module) -> torch.Tensor:
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask).logits[0, :-1]
        nll = -logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        inside = example[1:] == example[:-1]
        return torch.zeros(3, dtype=nll.dtype).index_add(0, example[1:], nll * inside)

    return Case(case.model, loss_fn), example[None]


@pytest.mark.parametrize("variant", ["lora", "embedding_lora", "dora", "modules_to_save_norm", "modules_to_save_head"])
def test_packed_sequences_look_up_their_example_by_token(variant: str) -> None:
    case, rows = packed_case(**VARIANTS.get(variant, {}))
    agrees_with_loop(case, 1e-10, example_of_row=rows)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("variant", ["lora", "dora_dropout", "embedding_lora", "modules_to_save_norm"])
def test_checkpointing(variant: str, reentrant: bool) -> None:
    case = language_case(**VARIANTS.get(variant, {}))
    base: Any = case.model
    base.train()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    agrees_with_loop(case, 1e-10)


@pytest.mark.parametrize("checkpoints", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_bitsandbytes(quantisation: str, checkpoints: bool | None) -> None:
    torch.manual_seed(0)
    base = base_language_model("llama", "sdpa", hidden_size=64, intermediate_size=64, head_dim=32)
    model: Any = lora(quantised(base, quantisation), target_modules="all-linear", task_type="CAUSAL_LM")
    if checkpoints is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
        model.enable_input_require_grads()
    agrees_with_loop(Case(model, language_loss(tokens())), 1e-5)


def test_modules_with_accelerates_device_hooks() -> None:
    case = language_case()
    for module in case.model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    agrees_with_loop(case, 1e-10)
