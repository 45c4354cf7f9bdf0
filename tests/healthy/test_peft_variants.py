"""Ways of PEFT to build an adapter that take more than a plain loop; the others are in the matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from support.tiny import (
    VOCABULARY,
    Batches,
    Task,
    assert_healthy,
    judged,
    language_loss,
    lora,
    peft_llama,
    quantised_llama,
    token_batches,
)

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_trainable_token_rows_that_never_occur():
    batches = Batches([ids.clamp(max=20) for ids in token_batches(20)])
    model = peft_llama(trainable_token_indices=[VOCABULARY - 1, VOCABULARY - 2])
    report = judged(Task(model), batches)
    assert_healthy(report, but="LP303")
    waiting = next(f for f in report.findings if f.code == "LP303")
    assert waiting.status == "pending"
    assert "trainable_tokens_delta" in waiting.message


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


@pytest.mark.parametrize("quantised", ["nf4", "int8"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_qlora(tmp_path: Path, quantised, reentrant):
    base = quantised_llama(tmp_path, quantised, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = get_peft_model(base, lora(target_modules=ALL_LINEAR))
    report = judged(Task(model), token_batches(8))
    assert_healthy(report, but="LP301" if reentrant else "")
