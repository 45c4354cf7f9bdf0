"""A probed run and an unprobed one end bit-equal: weights, optimizer state, gradients, random numbers."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from peft import get_peft_model
from support.tiny import Batches, Task, adamw, fit, language_loss, lora, peft_llama, quantised_llama, token_batches
from torch import nn

from lora_probe_callbacks import LoraProbe, LoraProbeWarning

STEPS = 20


class Diary(pl.Callback):
    """Keeps every gradient as the optimizer is about to get it, and the modes at every step."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.modes: list[Any] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, task: pl.LightningModule, optimizer: object) -> None:
        self.gradients += [p.grad.clone() for p in task.parameters() if p.grad is not None]
        self.modes.append(([m.training for m in task.modules()], [p.requires_grad for p in task.parameters()]))


def run(make: Callable[[], Task], probe: LoraProbe | None, batches: Batches, **trainer: Any) -> list[Any]:
    """Train, and return all that must not depend on the probe."""
    random.seed(3), np.random.seed(3)
    task, diary = make(), Diary()
    torch.manual_seed(3)
    finished = fit(task, probe, batches, callbacks=[diary], **trainer)
    assert diary.gradients, "the run must train"
    optimizers = [optimizer.state_dict() for optimizer in finished.optimizers]
    streams = [torch.get_rng_state(), random.getstate(), np.random.get_state()]
    grads = [None if p.grad is None else p.grad.clone() for p in task.parameters()]
    return [task.state_dict(), optimizers, streams, grads, diary.gradients, diary.modes]


def differences(some: Any, others: Any, where: str = "") -> Iterator[str]:
    if isinstance(some, torch.Tensor):
        if some.dtype != others.dtype or not torch.equal(some, others):
            yield where
    elif isinstance(some, np.ndarray):
        if not np.array_equal(some, others):
            yield where
    elif isinstance(some, dict):
        assert some.keys() == others.keys()
        for key in some:
            yield from differences(some[key], others[key], f"{where}.{key}")
    elif isinstance(some, list | tuple):
        assert len(some) == len(others), where
        for index, (a, b) in enumerate(zip(some, others, strict=True)):
            yield from differences(a, b, f"{where}[{index}]")
    elif some != others:
        yield where


def assert_equal_with_and_without(make: Callable[[], Task], batches: Batches, **trainer: Any) -> None:
    without = run(make, None, batches, **trainer)
    for every in (1, 50):
        probe = LoraProbe(every_n_steps=every, verbose=False)
        assert not list(differences(without, run(make, probe, batches, **trainer)))
        assert probe.report.healthy, str(probe.report)


def test_plain_lora_with_dropout():
    assert_equal_with_and_without(lambda: Task(peft_llama(lora_dropout=0.3)), token_batches(STEPS))


def test_the_comparison_sees_a_difference():
    """The other tests of this file would pass on an empty comparison."""
    one, other = (run(lambda: Task(peft_llama()), None, token_batches(n)) for n in (2, 3))
    found = list(differences(one[0], other[0]))
    assert len(found) == 8
    assert all("lora_" in name for name in found)


def test_qlora_with_checkpointing(tmp_path: Path):
    def make() -> Task:
        return Task(get_peft_model(quantised_llama(tmp_path), lora(lora_dropout=0.3)))

    assert_equal_with_and_without(make, token_batches(STEPS))


def test_accumulation():
    batches = token_batches(4 * STEPS)
    assert_equal_with_and_without(lambda: Task(peft_llama(lora_dropout=0.3)), batches, accumulate_grad_batches=4)


def test_bf16_mixed():
    make = lambda: Task(peft_llama(lora_dropout=0.3))  # noqa: E731
    assert_equal_with_and_without(make, token_batches(STEPS), precision="bf16-mixed")


def test_clipping_and_two_optimizers():
    def step(task: Task, ids: torch.Tensor, index: int) -> None:
        for optimizer in task.optimizers():
            task.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            task.manual_backward(language_loss(task, ids, index))
            task.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            task.untoggle_optimizer(optimizer)

    def optimizers(task: Task) -> list[torch.optim.Optimizer]:
        tensors = [p for p in task.parameters() if p.requires_grad]
        return [torch.optim.AdamW(tensors[0::2], lr=1e-2), torch.optim.AdamW(tensors[1::2], lr=1e-2)]

    make = lambda: Task(peft_llama(lora_dropout=0.3), step, optimizers, automatic=False)  # noqa: E731
    assert_equal_with_and_without(make, token_batches(STEPS))


class Normalised(nn.Module):
    """Whatever a second forward could disturb: random numbers, buffers, and what a module notes for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.features = 0, []
        self.register_buffer("seen", torch.zeros(()))
        self.inside, self.norm, self.drop = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3)
        self.hidden, self.out = nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(self.hidden(self.norm(self.inside(x))))
        self.calls += 1
        self.seen = self.seen + h.detach().abs().max()
        self.features.append(h)
        self.penalty = h.square().mean()
        return self.out(h) + 0.1 * random.random() + 0.1 * np.random.rand()


def normalised() -> Task:
    def step(task: Task, x: torch.Tensor, index: int) -> torch.Tensor:
        region = contextlib.nullcontext() if torch.is_autocast_enabled("cpu") else torch.autocast("cpu", torch.bfloat16)
        with region:
            loss = (task.model(x).float() - 1).square().mean()
        inner = task.model.get_base_model()
        assert inner.calls == len(inner.features) == index + 1
        return loss + 0.1 * inner.penalty.float() + 0.1 * inner.features[-1].float().abs().mean()

    torch.manual_seed(0)
    model = get_peft_model(Normalised(), lora(target_modules=["inside", "hidden"], lora_dropout=0.3))
    return Task(model, step, lambda task: adamw(task, lr=5e-2))


def vectors() -> Batches:
    return Batches(list(torch.randn(STEPS, 4, 8, generator=torch.Generator().manual_seed(1))))


def test_forward_is_repeated_in_an_autocast_block():
    without = run(normalised, None, vectors())
    probe = LoraProbe(every_n_steps=1, verbose=False)
    assert not list(differences(without, run(normalised, probe, vectors())))
    assert "LP405" in {f.code for f in probe.report.with_status("pass")}, "the forward must have been repeated"


def test_forward_is_repeated_in_one_autocast_block_around_all_steps():
    with torch.autocast("cpu", torch.bfloat16):
        without = run(normalised, None, vectors())
    probe = LoraProbe(every_n_steps=1, verbose=False, on_failure="warn", select=["LP405"])
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraProbeWarning)
        watched = run(normalised, probe, vectors())
    assert not list(differences(without, watched))
    assert [f.code for f in probe.report.failures] == ["LP405"], "the forward must have been repeated"


def test_forward_with_a_hook_of_the_users_is_not_repeated():
    """Feature distillation collects hidden states through forward hooks: a second call would collect them twice."""
    features: list[torch.Tensor] = []
    task = normalised()
    task.model.get_base_model().hidden.register_forward_hook(lambda module, args, out: features.append(out))
    probe = LoraProbe(every_n_steps=1, verbose=False)
    fit(task, probe, vectors())
    assert len(features) == STEPS
    finding = next(f for f in probe.report.findings if f.code == "LP405")
    assert finding.status == "skipped"
    assert "forward hook" in finding.message
