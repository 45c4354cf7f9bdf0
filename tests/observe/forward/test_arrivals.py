"""LP309 and LP310: whether what has arrived is what is applied."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.doors import DOORS, RunTrainer
from support.facts import ALL, bad, expect, facts
from support.training import Training, adamw, batches, lora, next_token_loss, trained
from torch import nn
from torch.optim import Optimizer

from lora_probe_callbacks import LoraProbeMonitor, LoraProbeTrainerCallback, ProbeReport
from lora_probe_callbacks.checks.reachability import cleared_gradient, kept_gradient
from lora_probe_callbacks.facts import Accumulation

PASSES = 4
Step = Callable[[nn.Module, Optimizer, list[torch.Tensor]], None]


def run(step: Step, steps: int = 6, passes: int = PASSES, **declared: Any) -> ProbeReport:
    """Train a plain loop whose step is given: a model, an optimizer, and the micro-batches of one step."""
    model = lora()
    trained(model)
    optimizer = adamw(model)
    data = batches(steps * passes)
    settings = {"verbose": False, "on_failure": "warn", "every_n_steps": 1, **declared}
    with LoraProbeMonitor(model, optimizer, **settings) as probe:
        for number in range(steps):
            step(model, optimizer, data[number * passes :][:passes])
    assert not probe.report.internal_errors, probe.report.internal_errors
    assert probe.report.judged_steps == steps
    return probe.report


def found(report: ProbeReport) -> list[tuple[str, str, int]]:
    return [(f.code, f.status, f.step) for f in report.with_status("fail", "warn")]


# --- cleared ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::lora_probe_callbacks.LoraProbeWarning")
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("where", ["before the forward", "before the backward"])
def test_gradients_cleared_before_every_micro_batch(where: str, set_to_none: bool) -> None:
    def step(model: nn.Module, optimizer: Optimizer, data: list[torch.Tensor]) -> None:
        for batch in data:
            if where == "before the forward":
                optimizer.zero_grad(set_to_none)
            loss = next_token_loss(model, batch, 0) / len(data)
            if where == "before the backward":
                optimizer.zero_grad(set_to_none)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()

    report = run(step)
    assert found(report) == [("LP309", "fail", 1)]
    assert "3 of 4 backward passes are cleared" in report.failures[0].message
    assert found(run(step, passes=2)) == [("LP309", "warn", 3)]


@pytest.mark.filterwarnings("ignore::lora_probe_callbacks.LoraProbeWarning")
def test_gradients_cleared_by_a_trainers_training_step() -> None:
    class Clearing(RunTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.optimizer.zero_grad()
            return super().training_step(*args, **kwargs)

    probe = LoraProbeTrainerCallback(verbose=False, on_failure="warn", every_n_steps=1)
    training = Training(lora(), accumulate=PASSES)
    with tempfile.TemporaryDirectory() as folder:
        Clearing(training, folder, 4, [probe]).train()
    assert found(probe.report) == [("LP309", "fail", 1)]
    assert probe.report.judged_steps == 4


@pytest.mark.parametrize("door", DOORS)
def test_accumulation_is_healthy(door: str) -> None:
    made, fit = DOORS[door](Training(lora(), accumulate=PASSES), 4, verbose=False, every_n_steps=1)
    fit()
    assert not found(made.report)
    assert made.report.judged_steps == 4
    assert {"LP309", "LP310"} <= {f.code for f in made.report.with_status("pass")}


def moved_in_between(model: nn.Module, optimizer: Optimizer, data: list[torch.Tensor]) -> None:
    """SAM: a step up, the gradient there, and back."""
    moved = [p for p in model.parameters() if p.requires_grad]
    for batch in data:
        next_token_loss(model, batch, 0).backward()
        ahead = [p.grad * 1e-3 for p in moved]
        with torch.no_grad():
            torch._foreach_add_(moved, ahead)
        optimizer.zero_grad()
        next_token_loss(model, batch.clone(), 0).backward()
        with torch.no_grad():
            torch._foreach_sub_(moved, ahead)
        optimizer.step()
        optimizer.zero_grad()


def combined_by_hand(model: nn.Module, optimizer: Optimizer, data: list[torch.Tensor]) -> None:
    """One gradient a task, put together by the loop."""
    moved = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for batch in data:
        optimizer.zero_grad()
        next_token_loss(model, batch, 0).backward()
        gradients.append([p.grad.clone() for p in moved])
    for tensor, *mine in zip(moved, *gradients, strict=True):
        tensor.grad = torch.stack(mine).sum(0)
    optimizer.step()
    optimizer.zero_grad()


def looked_at_twice(model: nn.Module, optimizer: Optimizer, data: list[torch.Tensor]) -> None:
    """The gradient norm of one part of the loss is logged; then the step is made from the same batch."""
    (batch,) = data
    next_token_loss(model, batch, 0).backward()
    nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.zero_grad()
    (2 * next_token_loss(model, batch, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()


def differentiated_beside(model: nn.Module, optimizer: Optimizer, data: list[torch.Tensor]) -> None:
    """torch.autograd.grad leaves nothing in .grad that could be lost."""
    (batch,) = data
    loss = next_token_loss(model, batch, 0)
    torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], retain_graph=True)
    next_token_loss(model, batch.clone(), 0).backward()
    optimizer.step()
    optimizer.zero_grad()


def thrown_away_now_and_then(model: nn.Module, optimizer: Optimizer, data: list[torch.Tensor]) -> None:
    for batch in data:
        next_token_loss(model, batch, 0).backward()
        if int(batch.sum()) % 3 == 0:  # a bad batch
            optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()


def cleared_between_forward_and_backward(model: nn.Module, optimizer: Optimizer, data: list[torch.Tensor]) -> None:
    loss = sum(next_token_loss(model, batch, 0) for batch in data)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def clipped_for_every_batch(model: nn.Module, optimizer: Optimizer, data: list[torch.Tensor]) -> None:
    for batch in data:
        next_token_loss(model, batch, 0).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize(
    ("step", "passes"),
    [
        (moved_in_between, 1),
        (combined_by_hand, 4),
        (looked_at_twice, 1),
        (differentiated_beside, 1),
        (thrown_away_now_and_then, 4),
        (cleared_between_forward_and_backward, 4),
        (clipped_for_every_batch, 4),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_healthy_loops_that_clear_on_purpose(step: Step, passes: int) -> None:
    assert not found(run(step, passes=passes))


# --- kept ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::lora_probe_callbacks.LoraProbeWarning")
@pytest.mark.parametrize("passes", [1, 4])
def test_gradients_that_are_never_cleared(passes: int) -> None:
    def step(model: nn.Module, optimizer: Optimizer, data: list[torch.Tensor]) -> None:
        for batch in data:
            next_token_loss(model, batch, 0).backward()
        optimizer.step()

    report = run(step, passes=passes)
    assert found(report) == [("LP310", "fail", 2)]
    assert "never cleared" in report.failures[0].message


def test_gradients_that_fade_are_a_method() -> None:
    def step(model: nn.Module, optimizer: Optimizer, data: list[torch.Tensor]) -> None:
        next_token_loss(model, data[0], 0).backward()
        optimizer.step()
        for tensor in model.parameters():
            if tensor.grad is not None:
                tensor.grad.mul_(0.5)

    assert not found(run(step, passes=1))


def test_gradients_zeroed_behind_the_version_counter() -> None:
    def step(model: nn.Module, optimizer: Optimizer, data: list[torch.Tensor]) -> None:
        for tensor in model.parameters():
            if tensor.grad is not None:
                tensor.grad.data.zero_()
        next_token_loss(model, data[0], 0).backward()
        optimizer.step()

    assert not found(run(step, passes=1))


def assigned_by_hand(model: nn.Module, optimizer: Optimizer, data: list[torch.Tensor]) -> None:
    """torch.autograd.grad, and .grad is written: nothing has to be cleared."""
    moved = [p for p in model.parameters() if p.requires_grad]
    for tensor, gradient in zip(moved, torch.autograd.grad(next_token_loss(model, data[0], 0), moved), strict=True):
        tensor.grad = gradient
    optimizer.step()


def cleared_after_another_loss(model: nn.Module, optimizer: Optimizer, data: list[torch.Tensor]) -> None:
    """A discriminator's loss reaches the generator as well, whose gradients are cleared before its own."""
    next_token_loss(model, data[0].flip(1), 0).backward()
    optimizer.zero_grad()
    next_token_loss(model, data[0], 0).backward()
    optimizer.step()


@pytest.mark.parametrize("step", [assigned_by_hand, cleared_after_another_loss])
def test_gradients_that_need_no_clearing(step: Step) -> None:
    assert "LP310" not in {code for code, _, _ in found(run(step, steps=3, passes=1))}


# --- verdicts -----------------------------------------------------------------------------------


def steps(*accumulated: Accumulation) -> Any:
    return facts(accumulated=accumulated)


LOST = Accumulation(4, 3, aligned=1.0)


@pytest.mark.parametrize(
    ("accumulated", "status"),
    [
        ([LOST, LOST], "fail"),
        ([LOST], "pending"),
        ([Accumulation(4), LOST], "pending"),
        ([LOST, Accumulation(4, 2, aligned=1.0), LOST], "pending"),  # as a loop that drops bad batches
        ([Accumulation(2, 1, aligned=1.0)] * 3, "pending"),
        ([Accumulation(2, 1, aligned=1.0)] * 4, "warn"),
        ([Accumulation(4, 3, aligned=0.97)] * 4, "skipped"),
        ([Accumulation(4, 3)] * 4, "skipped"),
        ([LOST, LOST, Accumulation(4)], "pass"),
        ([Accumulation(1)], "pass"),
        ([Accumulation(0)], "pending"),
        ([], "pending"),
    ],
)
def test_cleared(accumulated: list[Accumulation], status: str) -> None:
    assert cleared_gradient.CHECK.judge(steps(*accumulated)).status == status


def test_cleared_is_said_in_numbers() -> None:
    what = steps(LOST, LOST)
    assert list(bad(what)) == ["LP309"]
    expect(
        cleared_gradient.CHECK.judge(what),
        "fail",
        "the gradients of 3 of 4 backward passes are cleared",
        slots=ALL,
        got="3 of 4 passes cleared, in 2 steps in a row",
        expected="the sum of 4 passes",
    )


@pytest.mark.parametrize(("old", "status"), [([4, 4], "fail"), ([0, 4], "pending"), ([4, 0], "pass"), ([], "pending")])
def test_kept(old: list[int], status: str) -> None:
    what = steps(*(Accumulation(1, old=number) for number in old))
    assert kept_gradient.CHECK.judge(what).status == status
    assert list(bad(what)) == (["LP310"] if status == "fail" else [])
