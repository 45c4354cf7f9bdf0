"""Every way of PEFT to build an adapter: LoRA's variants are judged, other tuners neither crash nor alarm."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import peft
import pytest
import torch
from peft import get_peft_model
from tiny import (
    VOCABULARY,
    Batches,
    Task,
    assert_healthy,
    judged,
    language_loss,
    llama,
    lora,
    peft_llama,
    quantised_llama,
    token_batches,
)

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "gaussian"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        {"layers_to_transform": [1]},
        pytest.param(
            {"lora_bias": True},
            marks=pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),  # on layers without a bias
        ),
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ALL_LINEAR},
        {"target_parameters": ["mlp.gate_proj.weight"], "target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_lora_variant(config):
    assert_healthy(judged(Task(peft_llama(**config))))


def test_trainable_token_rows_that_never_occur():
    batches = Batches([ids.clamp(max=20) for ids in token_batches(20)])
    model = peft_llama(trainable_token_indices=[VOCABULARY - 1, VOCABULARY - 2])
    report = judged(Task(model), batches)
    assert_healthy(report, but="LP303")
    waiting = next(f for f in report.findings if f.code == "LP303")
    assert waiting.status == "pending"
    assert "trainable_tokens_delta" in waiting.message


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # is what is tested
def test_tied_embeddings():
    assert_healthy(judged(Task(peft_llama(llama(tie_word_embeddings=True), target_modules=["q_proj", "embed_tokens"]))))


def test_several_active_adapters():
    model = peft_llama()
    model.add_adapter("second", lora(r=2))
    model.base_model.set_adapter(["default", "second"])
    assert_healthy(judged(Task(model)))


@pytest.mark.parametrize("block", [1, 3])
def test_adapters_that_take_turns(block):
    model = peft_llama()
    model.add_adapter("second", lora())

    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        task.model.set_adapter(("default", "second")[index // block % 2])
        return language_loss(task, ids, index)

    def optimizers(task: Task) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for n, p in task.named_parameters() if "lora_" in n], lr=1e-2)

    report = judged(Task(model, step, optimizers), token_batches(24), intent={"adapter": ("default", "second")})
    assert_healthy(report)


def test_inactive_declared_adapter():
    model = peft_llama()
    model.add_adapter("ref", lora())
    assert_healthy(judged(Task(model), intent={"reference_adapters": ("ref",)}), also="LP207")


def test_transformers_native_adapter():
    model = llama()
    model.add_adapter(lora())
    assert_healthy(judged(Task(model)))


@pytest.mark.parametrize("quantised", ["nf4", "int8"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_qlora(tmp_path: Path, quantised, reentrant):
    base = quantised_llama(tmp_path, quantised, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = get_peft_model(base, lora(target_modules=ALL_LINEAR))
    report = judged(Task(model), token_batches(8))
    assert_healthy(report, but="LP301" if reentrant else "")


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
        peft.LoKrConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
        peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=8, target_modules=["q_proj", "v_proj"]),
        peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj"]),
        pytest.param(
            peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
            # peft 0.21 knows nn.LayerNorm alone, and trains the others all the same
            marks=pytest.mark.filterwarnings("ignore:Unsupported layer type"),
        ),
        peft.TrainableTokensConfig(token_indices=[1, 2]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_tuner_neither_crashes_nor_alarms(config):
    model = get_peft_model(llama(), config)
    report = judged(Task(model))
    assert not report.with_status("fail", "warn"), str(report)
    assert not report.internal_errors, report.internal_errors
    passed = {f.code for f in report.with_status("pass")}
    assert {"LP201", "LP203", "LP302", "LP303", "LP401"} <= passed, str(report)


def test_adalora():
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        init_r=4,
        target_r=2,
        tinit=2,
        tfinal=4,
        total_step=20,
    )

    class Allocate(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, task: Task, *args: object) -> None:
            task.model.base_model.update_and_allocate(trainer.global_step)

    assert_healthy(judged(Task(get_peft_model(llama(), config)), callbacks=[Allocate()]))
