"""Records of real runs: a tiny Llama, a real optimizer, the monitor's door."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lora_probe_callbacks import LoraProbeError, LoraProbeMonitor, ProbeReport

Event = Callable[[int, PeftModel], None]


def tiny() -> PeftModel:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=16, use_cache=False, **sizes))
    base.enable_input_require_grads()  # as every run with checkpointing does: a merged adapter is silent then
    return get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))


def nothing(step: int, model: PeftModel) -> None:
    """A healthy run."""


def merged_from(first: int) -> Event:
    def event(step: int, model: PeftModel) -> None:
        if step == first:
            model.merge_adapter()

    return event


def trained(record: Path, steps: int = 8, event: Event = nothing, **intent: Any) -> ProbeReport:
    """Train and record; what the probe raises ends the run, as it would end a script."""
    model = tiny()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    settings = {"every_n_steps": 1, "verbose": False, "record": record} | intent
    rows = torch.randint(32, (4, 8))
    probe = LoraProbeMonitor(model, optimizer, **settings)
    try:
        with probe:
            for step in range(steps):
                event(step, model)
                model(input_ids=rows, labels=rows).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    except LoraProbeError:
        pass
    return probe.report
