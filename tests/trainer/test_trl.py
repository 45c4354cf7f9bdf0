"""TRL's trainers on tiny models: SFT, DPO with the adapter disabled as its own reference, GRPO that generates."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.training import hooks_of_the_probe, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from lora_probe_callbacks import LoraProbeError, LoraProbeTrainerCallback, faults

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "cat",
    "sleeps",
    "on",
    "red",
    "mat",
    "in",
    "sun",
]
SENTENCES = [" ".join(WORDS[(i * k) % len(WORDS)] for i in range(6)) for k in range(1, 17)]
STEPS = 6


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        **more,
    }


def lora_config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def sft(folder: Path, callbacks: list[TrainerCallback], **more: Any) -> Trainer:
    return SFTTrainer(
        model=llama(),
        args=SFTConfig(**settings(folder, max_length=16, **more)),
        train_dataset=Dataset.from_list([{"text": s} for s in SENTENCES]),
        processing_class=tokenizer(),
        peft_config=lora_config(),
        callbacks=callbacks,
    )


def dpo(folder: Path, callbacks: list[TrainerCallback], **more: Any) -> Trainer:
    rows = [
        {"prompt": s, "chosen": " fox jumps", "rejected": " mat in sun"}
        if i % 2
        else {"prompt": s, "chosen": " dog", "rejected": " cat sleeps"}
        for i, s in enumerate(SENTENCES)
    ]
    return DPOTrainer(
        model=llama(),
        args=DPOConfig(**settings(folder, max_length=24, **more)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=lora_config(),
        callbacks=callbacks,
    )


def grpo(folder: Path, callbacks: list[TrainerCallback], reward: Callable[..., list[float]], **more: Any) -> Trainer:
    options = {"num_generations": 2, "max_completion_length": 4, "logging_steps": 1, **more}
    return GRPOTrainer(
        model=llama(),
        reward_funcs=reward,
        args=GRPOConfig(**settings(folder, **options)),
        train_dataset=Dataset.from_list([{"prompt": s} for s in SENTENCES]),
        processing_class=tokenizer(),
        peft_config=lora_config(),
        callbacks=callbacks,
    )


def kto(folder: Path, callbacks: list[TrainerCallback], **more: Any) -> Trainer:
    rows = [{"prompt": s, "completion": " fox jumps", "label": i % 2 == 0} for i, s in enumerate(SENTENCES)]
    return KTOTrainer(
        model=llama(),
        args=KTOConfig(**settings(folder, max_length=24, **more)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=lora_config(),
        callbacks=callbacks,
    )


calls = 0


def seldom(completions: list[str], **_: Any) -> list[float]:
    """The same reward for the whole group in two batches of three: their advantages are zero."""
    global calls
    calls += 1
    return [float(i) if calls % 3 == 1 else 1.0 for i in range(len(completions))]


TRAINERS: dict[str, Callable[..., Trainer]] = {
    "sft": sft,
    "sft-accumulated-bf16": lambda folder, callbacks: sft(folder, callbacks, gradient_accumulation_steps=2, bf16=True),
    "dpo": dpo,
    "dpo-precomputed": lambda folder, callbacks: dpo(folder, callbacks, precompute_ref_log_probs=True),
    "kto": kto,
    "grpo": lambda folder, callbacks: grpo(folder, callbacks, seldom),
    "grpo-kl": lambda folder, callbacks: grpo(folder, callbacks, seldom, beta=0.1, num_iterations=2),
}


@pytest.fixture(autouse=True)
def _from_the_start() -> None:
    global calls
    calls = 0
    torch.manual_seed(0)


@pytest.mark.parametrize("name", TRAINERS)
def test_healthy_run(name: str, tmp_path: Path) -> None:
    probe = LoraProbeTrainerCallback(every_n_steps=1, verbose=False)
    trainer = TRAINERS[name](tmp_path, [probe])
    trainer.train()
    report = probe.report
    assert report.judged_steps == STEPS
    assert not report.with_status("fail", "warn"), str(report)
    assert not report.internal_errors, report.internal_errors
    passed = {f.code for f in report.with_status("pass")}
    assert {"LP101", "LP102", "LP103", "LP104", "LP201", "LP301", "LP302", "LP303", "LP401"} <= passed, str(report)
    looked = probe._session._collector.looks.responses
    assert any(r.central is not None for r in looked), {r.why_not for r in looked}
    assert not list(hooks_of_the_probe(trainer.model))
    steps = [row["step"] for row in trainer.state.log_history if "lora_probe/healthy" in row]
    assert steps == list(range(1, STEPS + 1))


class MergesAt(TrainerCallback):
    """Merges before a step, as a weight sync does, and leaves it so."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            kwargs["model"].enable_input_require_grads()
            faults.left_merged(kwargs["model"])


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_adapter_that_is_left_merged_stops_the_run(name: str, tmp_path: Path) -> None:
    probe = LoraProbeTrainerCallback(every_n_steps=1, verbose=False)
    if name == "dpo":  # with checkpointing it is loud: the reference forward unmerges before the recomputation
        trainer = dpo(tmp_path, [MergesAt(2), probe], gradient_checkpointing=False)
    else:
        trainer = TRAINERS[name](tmp_path, [MergesAt(2), probe])
    with pytest.raises(LoraProbeError) as caught:
        trainer.train()
    assert [(f.code, f.step) for f in caught.value.findings] == [("LP103", 2)]
    assert trainer.state.global_step == 2, "before the update"


class Sampler:
    """A model of its own that samples for GRPO; it is sent the adapter before each generation, or never."""

    def __init__(self, *, synced: bool) -> None:
        self.synced = synced
        self.model: Any = None

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        if self.model is None or self.synced:
            self.model = get_peft_model(llama(), lora_config()).eval()
            self.model.load_state_dict(trainer.accelerator.unwrap_model(trainer.model).state_dict())
        found: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for prompt in prompts:
            ids = trainer.processing_class(prompt)["input_ids"]
            given, log_probs = len(ids), []
            for _ in range(8):
                with torch.no_grad():
                    p = self.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
                token = int(torch.multinomial(p, 1))
                ids = [*ids, token]
                log_probs.append(float(p[token].log()))
            found["prompt_ids"].append(ids[:given])
            found["completion_ids"].append(ids[given:])
            found["logprobs"].append(log_probs)
        return found


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(token % 2 for token in ids)) for ids in completion_ids]


def sampled_grpo(folder: Path, *, synced: bool) -> LoraProbeTrainerCallback:
    probe = LoraProbeTrainerCallback(every_n_steps=1, verbose=False, on_failure="stop")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    options = {"num_generations": 4, "max_completion_length": 8, "learning_rate": 5e-2, "max_steps": 8}
    trainer = GRPOTrainer(
        model=llama(),
        reward_funcs=even,
        args=GRPOConfig(**settings(folder, per_device_train_batch_size=16, **options)),
        train_dataset=Dataset.from_list([{"prompt": s} for s in SENTENCES]),
        processing_class=tokenizer(),
        peft_config=lora_config(),
        callbacks=[probe],
        rollout_func=Sampler(synced=synced),
    )
    trainer.train()
    return probe


def test_grpo_whose_sampler_is_sent_the_adapter_is_served(tmp_path: Path) -> None:
    report = sampled_grpo(tmp_path, synced=True).report
    assert not report.with_status("fail", "warn"), str(report)
    assert report.proofs["served"].complete, str(report)


def test_grpo_whose_sampler_is_never_sent_the_adapter_stops(tmp_path: Path) -> None:
    report = sampled_grpo(tmp_path, synced=False).report
    assert [f.code for f in report.failures] == ["LP817"], str(report)
    assert "never sent it" in report.failures[0].message
