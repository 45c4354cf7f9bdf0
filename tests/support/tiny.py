"""Tiny real models and a Lightning module made from functions: a test states only what is special about its run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_probe_callbacks import LoraProbe, ProbeReport

torch.set_num_threads(1)

VOCABULARY, LENGTH = 32, 8
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
}
# What every healthy run of plain LoRA can be judged on. Others need a declaration (LP207), 16-bit
# adapters (LP403) or autocast around the forward (LP405).
CORE = {f"LP1{n:02}" for n in range(1, 9)} | {f"LP{n}" for n in (201, 202, 203, 206, 208, 209)}
CORE |= {f"LP{n}" for n in (301, 302, 303, 401, 402, 404, 406, 501)}


def llama(layers: int = 2, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | config)))


def lora(**config: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | config))


def peft_llama(base: nn.Module | None = None, **config: Any) -> PeftModel:
    return get_peft_model(llama() if base is None else base, lora(**config))


def quantised_llama(path: Path, kind: str = "nf4", **prepare: Any) -> nn.Module:
    """A base loaded in nf4 or int8 by bitsandbytes and prepared as its documentation says, checkpointing included."""
    llama(hidden_size=64, intermediate_size=64).save_pretrained(path)
    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        if kind == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    base = LlamaForCausalLM.from_pretrained(path, quantization_config=config, device_map={"": "cpu"})
    prepare = {"gradient_checkpointing_kwargs": {"use_reentrant": True}} | prepare  # torch wants it said
    return prepare_model_for_kbit_training(base, **prepare).train()


class Batches:
    """An iterable of batches with a length; a list would be taken for several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def token_batches(count: int) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return Batches([torch.randint(1, VOCABULARY, (2, LENGTH), generator=generator) for _ in range(count)])


def language_loss(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
    return task.model(input_ids=ids, labels=ids).loss


def adamw(task: nn.Module, **settings: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], **({"lr": 1e-2} | settings))


class Task(pl.LightningModule):
    """A model, its training step, its optimizers, and further parts as attributes.

    Args:
        model: What is trained.
        step: Called as ``step(task, batch, batch_index)``.
        optimizers: Called as ``optimizers(task)``.
        automatic: Lightning's automatic optimization.
        **parts: Further attributes.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Callable[[Task, Any, int], Any] = language_loss,
        optimizers: Callable[[Task], Any] = adamw,
        *,
        automatic: bool = True,
        **parts: Any,
    ) -> None:
        super().__init__()
        self.model = model
        self.step, self.make_optimizers = step, optimizers
        self.automatic_optimization = automatic
        for name, part in parts.items():
            setattr(self, name, part)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return self.make_optimizers(self)


def fit(
    task: pl.LightningModule,
    probe: pl.Callback | None = None,
    batches: Batches | None = None,
    *,
    callbacks: Sequence[pl.Callback] = (),
    **trainer: Any,
) -> pl.Trainer:
    """Train for one epoch, 20 batches if nothing else is said."""
    run = pl.Trainer(**(QUIET | {"callbacks": [*([probe] if probe else []), *callbacks]} | trainer))
    run.fit(task, token_batches(20) if batches is None else batches)
    return run


def judged(
    task: pl.LightningModule, batches: Batches | None = None, *, intent: dict[str, Any] | None = None, **trainer: Any
) -> ProbeReport:
    """Train with a probe at every step and return what it found."""
    probe = LoraProbe(**({"every_n_steps": 1, "verbose": False} | (intent or {})))
    fit(task, probe, batches, **trainer)
    return probe.report


def assert_healthy(report: ProbeReport, *, but: str = "", also: str = "", from_step: int = 4) -> None:
    """No fail, no warn, no error inside, and the checks really judged, late in the run as well.

    Args:
        report: What the probe found.
        but: Codes that cannot be judged in this run.
        also: Codes beyond the usual ones that must have been judged.
        from_step: Each check must have passed at this step or a later one.
    """
    assert not report.with_status("fail", "warn"), str(report)
    assert not report.internal_errors, report.internal_errors
    assert report.healthy is True
    expected = (CORE - set(but.split())) | set(also.split())
    silent = {
        f.code: f"{f.status} at step {f.last_step}: {f.message}"
        for f in report.findings
        if f.code in expected and (f.status != "pass" or f.last_step < from_step)
    }
    assert not silent, silent
    assert expected <= {f.code for f in report.findings}
