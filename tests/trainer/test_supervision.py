"""What TRL's trainers and transformers' collators supervise: real chat templates, packing, masks and truncation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.training import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from lora_probe_callbacks import LoraProbeTrainerCallback, ProbeReport

SPECIAL = ["<pad>", "<end>", "<unk>", "<|im_start|>", "<|im_end|>"]
QUESTIONS = ["why is it so", "what is a lake", "who said that", "when did it end", "where is home"]
ANSWERS = ["because it was made so", "a body of water", "nobody we know", "long ago", "where the cat sleeps at night"]
# ChatML, Llama 3's and Gemma's headers, and Mistral's brackets, each with the markers of what the assistant says.
TEMPLATES = {
    "chatml": ("<|im_start|>{}\n", "<|im_end|>", "\n"),
    "header": ("<|im_start|>[{}]\n\n", "<|im_end|>", ""),
    "turn": ("<|im_start|>{}:", "<|im_end|>", "\n"),
    "brackets": ("[{}]", "<end>", ""),
}


def template(name: str) -> str:
    begin, end, after = TEMPLATES[name]
    opened = begin.format("{{ m.role }}")
    said = "{% generation %}{{ m.content }}" + end + "{% endgeneration %}"
    each = opened + "{% if m.role == 'assistant' %}" + said + "{% else %}{{ m.content }}" + end + "{% endif %}" + after
    asked = "{% if add_generation_prompt %}" + begin.format("assistant") + "{% endif %}"
    return "{% for m in messages %}" + each + "{% endfor %}" + asked


def tokenizer(chat: str = "chatml", **more: Any) -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE({t: i for i, t in enumerate([*SPECIAL, *alphabet])}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"} | more
    made = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, additional_special_tokens=SPECIAL[3:], **names)
    made.chat_template = template(chat)
    return made


def model() -> Any:
    return llama(vocab_size=len(SPECIAL) + 256, max_position_embeddings=256)


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return {"output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, **quiet, **more}


def config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def watch(trainer: Trainer) -> ProbeReport:
    probe = LoraProbeTrainerCallback(every_n_steps=1, on_failure="stop", verbose=False)
    trainer.add_callback(probe)
    trainer.train()
    assert not probe.report.internal_errors
    return probe.report


def found(report: ProbeReport) -> list[tuple[str, str]]:
    return [(f.code, f.status) for f in report.with_status("warn", "fail")]


def sft(folder: Path, rows: list[dict[str, Any]], words: PreTrainedTokenizerFast, **more: Any) -> ProbeReport:
    arguments = SFTConfig(**settings(folder, max_length=128, **more))
    trainer = SFTTrainer(
        model=model(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
        peft_config=config(),
    )
    return watch(trainer)


CHATS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in zip(QUESTIONS * 5, ANSWERS * 5, strict=True)
]
PAIRS = [{"prompt": q, "completion": " " + a} for q, a in zip(QUESTIONS * 5, ANSWERS * 5, strict=True)]


@pytest.mark.parametrize("chat", list(TEMPLATES))
def test_what_the_assistant_says_and_nothing_else(chat: str, tmp_path: Path) -> None:
    report = sft(tmp_path, CHATS, tokenizer(chat), assistant_only_loss=True)
    assert found(report) == []
    assert report.status == "healthy"
    assert report.supervision is not None
    row = report.supervision.rows[0]
    said = report.supervision.text(row).split("\u27e6")[1].split("\u27e7")[0]
    assert said in {a + TEMPLATES[chat][1] for a in ANSWERS}
    assert report.supervision.totals.stops > 0


@pytest.mark.parametrize("options", [{}, {"completion_only_loss": False}, {"gradient_accumulation_steps": 2}])
def test_prompts_and_completions(options: dict[str, Any], tmp_path: Path) -> None:
    report = sft(tmp_path, PAIRS, tokenizer(), **options)
    assert found(report) == []
    assert report.supervision is not None
    everything = options.get("completion_only_loss") is False
    assert (report.supervision.token_fraction > 0.9) == everything


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing(strategy: str, tmp_path: Path) -> None:
    rows = [{"text": f"{q} {a}"} for q, a in zip(QUESTIONS * 8, ANSWERS * 8, strict=True)]
    report = sft(tmp_path, rows, tokenizer(), packing=True, packing_strategy=strategy, num_train_epochs=8)
    assert found(report) == []
    assert report.status == "healthy"


def test_desired_and_undesired_answers(tmp_path: Path) -> None:
    rows = [{**pair, "label": i % 2 == 0} for i, pair in enumerate(PAIRS)]
    trainer = KTOTrainer(
        model=model(),
        args=KTOConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=config(),
    )
    report = watch(trainer)
    assert found(report) == []
    assert report.supervision is not None
    assert 0.3 < report.supervision.token_fraction < 0.8


# --- transformers' collators ----------------------------------------------------------------------


def plain(folder: Path, rows: list[dict[str, Any]], words: PreTrainedTokenizerFast, collator: Any) -> ProbeReport:
    trainer = Trainer(
        model=get_peft_model(model(), config()),
        args=TrainingArguments(**settings(folder)),
        train_dataset=rows,
        data_collator=collator,
        processing_class=words,
    )
    return watch(trainer)


def encoded(words: PreTrainedTokenizerFast, longest: int = 128) -> list[dict[str, list[int]]]:
    """Labels of the answers alone, both cut off at a length."""
    rows = []
    for question, answer in zip(QUESTIONS * 10, ANSWERS * 10, strict=True):
        prompt = words(question + " ").input_ids
        ids = [*prompt, *words(answer).input_ids, words.eos_token_id][:longest]
        rows.append({"input_ids": ids, "labels": ([-100] * len(prompt) + ids[len(prompt) :])[:longest]})
    return rows


def test_collator_for_language_models(tmp_path: Path) -> None:
    words = tokenizer()
    rows = [{"input_ids": row["input_ids"]} for row in encoded(words)]
    assert found(plain(tmp_path, rows, words, DataCollatorForLanguageModeling(words, mlm=False))) == []


def test_collator_for_answers(tmp_path: Path) -> None:
    words = tokenizer()
    report = plain(tmp_path, encoded(words), words, DataCollatorForSeq2Seq(words))
    assert found(report) == []
    assert report.supervision is not None
    assert report.supervision.totals.stops == report.supervision.totals.rows


def test_answers_that_are_cut_off_before_they_begin(tmp_path: Path) -> None:
    words = tokenizer()
    report = plain(tmp_path, encoded(words, longest=9), words, DataCollatorForSeq2Seq(words))
    (finding,) = report.failures
    assert (finding.code, finding.step) == ("LP001", 0)
    assert "the answer was cut off" in finding.fix


def test_padding_that_is_the_end_masks_the_end(tmp_path: Path) -> None:
    """The collator masks every pad token: with the end as padding, no end is a target."""
    words = tokenizer(pad_token="<end>")
    rows = [{"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"])} for row in encoded(words)]
    assert found(plain(tmp_path, rows, words, DataCollatorForLanguageModeling(words, mlm=False))) == [("LP004", "warn")]
