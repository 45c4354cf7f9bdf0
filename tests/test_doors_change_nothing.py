"""Behind the doors other than Lightning's, too, a probed run is bit-equal to one without a probe."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from support.doors import fit_plain, fit_trainer, new_scaler
from support.recipes import from_step
from support.tiny import lora as tiny_lora
from support.tiny import quantised_llama
from support.training import Training, adamw, adapter_tensors, lora, next_token_loss, trainable
from torch import Tensor, nn
from torch.optim import AdamW

from lora_probe_callbacks import LoraProbeMonitor, LoraProbeTrainerCallback, faults

STEPS = 8


def drawing(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    """A loss that draws from every stream that a probe could disturb."""
    return next_token_loss(model, batch % 32, step) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())


def dropout(**changes: Any) -> Training:
    return Training(lora(lora_dropout=0.3), drawing, **changes)


def fused(model: nn.Module) -> AdamW:
    return AdamW(trainable(model), lr=1e-3, fused=True)


def overflowing_at_first(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    loss = drawing(model, batch, step)
    return faults.overflowing(loss) if step in (0, 1, 4) else loss


RUNS: dict[str, Callable[[Path], Training]] = {
    "dropout": lambda _: dropout(),
    "accumulation": lambda _: dropout(accumulate=3),
    "bf16": lambda _: dropout(precision="bf16-mixed"),
    "qlora": lambda path: Training(get_peft_model(quantised_llama(path), tiny_lora(lora_dropout=0.3)), drawing),
    "scaler": lambda _: Training(lora(lora_dropout=0.3), overflowing_at_first, precision="16-mixed"),
    "fused-scaler": lambda _: Training(
        lora(lora_dropout=0.3), overflowing_at_first, optimizer=fused, precision="16-mixed"
    ),
    "zeros-in-place-of-none": lambda _: Training(
        lora(lora_dropout=0.3), overflowing_at_first, precision="16-mixed", set_to_none=False
    ),
}


def end_of(run: Training, fit: Callable[[], Any]) -> dict[str, Any]:
    """All that must not depend on the probe, when the run has ended."""
    losses: list[float] = []
    made = run.loss

    def noting(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        loss = made(model, batch, step)
        losses.append(loss.item())
        return loss

    run.loss = noting
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    fit()
    state = run.built_optimizer().state_dict()["state"]
    return {
        "losses": losses,
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        **{f"weight {n}": t.detach().clone() for n, t in adapter_tensors(run.model).items()},
        **{f"gradient {n}": t.grad for n, t in adapter_tensors(run.model).items()},
        **{f"state {i} {k}": v for i, values in state.items() for k, v in values.items()},
        **{f"buffer {n}": b for n, b in run.model.named_buffers()},
        "modes": [m.training for m in run.model.modules()],
    }


def same(some: Any, other: Any) -> bool:
    if isinstance(some, Tensor) and isinstance(other, Tensor):
        return some.dtype == other.dtype and torch.equal(some, other)
    if isinstance(some, np.ndarray):
        return np.array_equal(some, other)
    if isinstance(some, tuple | list):
        return len(some) == len(other) and all(map(same, some, other))
    return bool(some == other)


def plainly(run: Training, watched: bool, every: int) -> tuple[dict[str, Any], Any]:
    scaler = new_scaler(run)
    probe: Any = contextlib.nullcontext()
    if watched:
        probe = LoraProbeMonitor(run.model, run.built_optimizer(), scaler=scaler, every_n_steps=every, verbose=False)
    return end_of(run, lambda: fit_plain(run, probe, STEPS, scaler)), probe


def under_the_trainer(run: Training, watched: bool, every: int) -> tuple[dict[str, Any], Any]:
    probe = LoraProbeTrainerCallback(every_n_steps=every, verbose=False) if watched else None
    return end_of(run, lambda: fit_trainer(run, probe, STEPS, max_grad_norm=0.5, seed=3)), probe


@pytest.mark.parametrize("door", [plainly, under_the_trainer])
@pytest.mark.parametrize("name", RUNS)
def test_run_is_bit_equal_with_and_without_a_probe(name: str, door: Any, tmp_path: Path) -> None:
    without, _ = door(RUNS[name](tmp_path), False, 1)
    assert len(set(without["losses"])) > 4
    for every in (1, 50):
        watched, probe = door(RUNS[name](tmp_path), True, every)
        assert watched.keys() == without.keys()
        assert not [key for key in without if not same(without[key], watched[key])]
        assert probe.report.judged_steps >= 4
        assert probe.report.healthy is True, str(probe.report)


def test_the_comparison_sees_a_difference() -> None:
    """The test above would pass on an empty comparison."""
    run = Training(lora(lora_dropout=0.3), drawing, between_steps=from_step(5, lambda run: torch.rand(())))
    (one, _), (other, _) = plainly(dropout(), False, 1), plainly(run, False, 1)
    different = [key for key in one if not same(one[key], other[key])]
    assert {"losses", "torch"} <= set(different)
    assert sum("weight" in key for key in different) == len(adapter_tensors(run.model))
    assert adamw(run.model).state_dict()["state"] == {}
