"""The estimators used as a whole: from log-probs to a predicted and a measured change."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_probe_callbacks.estimators import (
    PromptBatch,
    UpdateDirection,
    entropy_surrogate,
    nll,
    per_prompt_projection,
    policy_gradient_surrogate,
    sequence_logprobs,
)

# Prompts of one length: an eager Llama in float64 makes nan of a left padding (its softmax is in float32,
# where the mask's smallest float64 is -inf; transformers 5.23).
BATCH = PromptBatch.from_ragged(
    [[5, 6], [8, 8], [9, 10]],
    [[[1], [2, 4, 3], [3]], [[9, 3], [3, 3], [1, 2]], [[4], [5, 6], [7, 8, 9]]],
    pad_id=3,
    advantages=[[1.0, -1.0, 0.0], [0.5, -1.0, 0.5], [0.0, 2.0, -2.0]],
)


@pytest.mark.parametrize("backend", ["doubled_rank", "alpha"])
@pytest.mark.parametrize("surrogate", [entropy_surrogate, policy_gradient_surrogate, nll])
def test_every_backend_projects_every_surrogate(tiny_llama_factory, surrogate, backend):
    model = tiny_llama_factory(dtype=torch.float64, attention="eager")
    torch.manual_seed(0)
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}

    def loss_fn(module):
        return surrogate(sequence_logprobs(module, BATCH, adapter="default"), BATCH)

    reference = per_prompt_projection(model, loss_fn, direction, backend="loop")
    rows = BATCH.example_of_row if backend == "doubled_rank" else None
    s = per_prompt_projection(model, loss_fn, direction, backend=backend, example_of_row=rows)
    assert bool(reference.abs().min() > 1e-3)
    torch.testing.assert_close(s, reference, rtol=1e-5, atol=1e-7)  # float32 inside Llama


def test_the_direction_of_one_adapter_is_projected_while_another_is_active(tiny_llama_factory):
    model = tiny_llama_factory(dtype=torch.float64)

    def loss_fn(module):
        return nll(sequence_logprobs(module, BATCH, adapter="default"), BATCH)

    direction = UpdateDirection.from_loss(model, loss_fn, lr=0.1)
    expected = per_prompt_projection(model, loss_fn, direction, example_of_row=BATCH.example_of_row)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    s = per_prompt_projection(model, loss_fn, direction, example_of_row=BATCH.example_of_row)
    assert model.active_adapters == ["other"]
    torch.testing.assert_close(s, expected)


def test_the_example_predicts_small_steps(tmp_path):
    example = Path(__file__).parents[2] / "examples" / "entropy_change.py"
    done = subprocess.run(
        [sys.executable, str(example), "--plot", str(tmp_path / "plot.png")],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    rows = [re.findall(r"[-+]?\d[\d.]*(?:e[-+]\d+)?", line) for line in done.stdout.splitlines() if "e-" in line]
    ratios = {row[0]: float(row[-1]) for row in rows}
    assert len(ratios) == 7
    assert abs(ratios["1e-05"] - 1) < 0.003
    assert abs(ratios["1e-05"] - 1) < abs(ratios["1e-04"] - 1) < abs(ratios["1e-03"] - 1)
    assert (tmp_path / "plot.png").exists() or "matplotlib is not installed" in done.stdout
