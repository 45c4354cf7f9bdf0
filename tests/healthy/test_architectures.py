"""Tiny models of the architectures that people adapt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from tiny import VOCABULARY, Task, assert_healthy, judged, lora

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def gpt2() -> tuple[Any, list[str], Any]:
    config = tf.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False)
    return tf.GPT2LMHeadModel(config), ["c_attn", "c_proj"], lambda ids: {"input_ids": ids, "labels": ids}


def t5() -> tuple[Any, list[str], Any]:
    config = tf.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config), ["q", "v"], lambda ids: {"input_ids": ids, "labels": ids}


def bert() -> tuple[Any, list[str], Any]:
    config = tf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **SMALL)
    label = torch.tensor([0, 1])
    return tf.BertForSequenceClassification(config), ["query", "value"], lambda ids: {"input_ids": ids, "labels": label}


def vit() -> tuple[Any, list[str], Any]:
    model = tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, **SMALL))
    label = torch.tensor([0, 1])

    def inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels = ids.float().mean() / VOCABULARY + torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8) / 384
        return {"pixel_values": pixels, "labels": label}

    attention = [
        n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "attention" in n
    ]
    return model, sorted(set(attention))[:2], inputs


def mixture() -> tuple[Any, list[str], Any]:
    config = tf.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        use_cache=False,
        **SMALL,
    )
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    return tf.Qwen3MoeForCausalLM(config), targets, lambda ids: {"input_ids": ids, "labels": ids}


# peft 0.21 warns of patterns that it has made itself for fused experts (huggingface/peft#3588)
@pytest.mark.filterwarnings("ignore:The following .* keys did not match")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
@pytest.mark.parametrize("make", [gpt2, t5, bert, vit, mixture], ids=lambda make: make.__name__)
def test_architecture(make):
    torch.manual_seed(0)
    base, targets, inputs = make()
    kind = {"bert": "SEQ_CLS"}.get(make.__name__)
    model = get_peft_model(base, lora(target_modules=targets, task_type=kind))
    report = judged(Task(model, lambda task, ids, _: task.model(**inputs(ids)).loss))
    assert_healthy(report)
