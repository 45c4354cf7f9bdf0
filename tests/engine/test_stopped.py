"""A loop that goes on without a step: at any cadence it must not end as healthy, and what only looks like it must."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.doors import DOORS, watch_through
from support.training import (
    Training,
    adamw,
    batches,
    left_by_the_probe,
    lora,
    next_token_loss,
    trainable,
)
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lora_probe_callbacks import LoraProbeError, LoraProbeMonitor, ProbeReport, faults


def run(
    after: Callable[[Optimizer, int], None],
    passes: int,
    *,
    loss: Callable[..., Tensor] = next_token_loss,
    **intent: str,
) -> ProbeReport:
    """A plain loop at the default cadence; ``after`` stands in the place of the step."""
    torch.manual_seed(0)
    model = lora()
    optimizer = adamw(model)
    with LoraProbeMonitor(model, optimizer, verbose=False, **{"on_failure": "stop", **intent}) as probe:
        for number, batch in enumerate(batches(passes)):
            loss(model, batch, number).backward()
            after(optimizer, number)
    assert not left_by_the_probe(model)
    assert not probe.report.internal_errors
    return probe.report


def stepped_until(last: int, *, cleared: bool, set_to_none: bool = True) -> Callable[[Optimizer, int], None]:
    def after(optimizer: Optimizer, number: int) -> None:
        if number < last:
            optimizer.step()
        if cleared or number < last:
            optimizer.zero_grad(set_to_none=set_to_none)

    return after


def test_a_loop_that_stops_stepping_is_reported_while_it_goes_on() -> None:
    with pytest.raises(LoraProbeError, match="LP406"):
        run(stepped_until(6, cleared=True), 400, on_failure="raise")
    report = run(stepped_until(6, cleared=True), 60)
    assert [(f.code, f.status) for f in report.with_status("fail", "warn")] == [("LP406", "fail")]
    assert report.status == "unhealthy"


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_loop_that_accumulates_for_ever_is_reported_while_it_goes_on(set_to_none: bool) -> None:
    kept = not set_to_none  # zeros in place of gradients look like gradients that are kept
    with pytest.raises(LoraProbeError, match="has stopped stepping"):
        run(stepped_until(6, cleared=kept, set_to_none=set_to_none), 200, on_failure="raise")
    report = run(stepped_until(6, cleared=kept, set_to_none=set_to_none), 60)
    assert [(f.code, f.status, f.cause) for f in report.with_status("fail", "warn")] == [("LP401", "warn", "stopped")]
    assert report.status == "unproven"


@pytest.mark.parametrize("passes", [10, 30])
def test_a_run_that_ends_without_its_last_steps_is_unproven(passes: int) -> None:
    report = run(stepped_until(6, cleared=True), passes)
    assert not report.with_status("fail", "warn")
    assert report.status == "unproven"
    assert not report.proofs["moved"].proven
    assert "steps no more, although backward passes go on" in report.proofs["moved"].why
    assert report.proofs["reached"].complete


@pytest.mark.parametrize("door", DOORS)
def test_under_every_door(door: str) -> None:
    def stop(run: Training, number: int) -> None:
        if number == 6:
            faults.stops_stepping(run.built_optimizer())

    watched = watch_through(door, Training(lora(), between_steps=stop), steps=14)
    assert watched.report.status != "healthy", watched.report


def test_of_two_optimizers_the_one_that_stops_is_named() -> None:
    model = lora(modules_to_save=["lm_head"])
    mine = [p for n, p in model.named_parameters() if "lora_" in n]
    head = [p for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad]
    first, second = AdamW(mine, lr=1e-3), AdamW(head, lr=1e-3)
    with LoraProbeMonitor(model, [first, second], verbose=False) as probe:
        for number, batch in enumerate(batches(120)):
            next_token_loss(model, batch, number).backward()
            second.step()
            if number < 6:
                first.step()
            model.zero_grad()
    proof = probe.report.proofs["moved"]
    assert probe.report.status == "unproven"
    assert proof.missing
    assert all("lora_" in name for name in proof.missing)
    assert "steps no more" in proof.why


# --- healthy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1, 3])
def test_what_is_left_of_an_accumulation_is_healthy(left: int) -> None:
    def after(optimizer: Optimizer, number: int) -> None:
        if number % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()

    assert run(after, 80 + left).status == "healthy"


def test_an_accumulation_that_grows_is_healthy() -> None:
    """1, 2, 4 ... 64 backward passes to a step."""
    ends = {2**n - 2 for n in range(1, 8)}

    def after(optimizer: Optimizer, number: int) -> None:
        if number in ends or number < 8:
            optimizer.step()
            optimizer.zero_grad()

    report = run(after, max(ends) + 1)
    assert report.status == "healthy", report


def test_gradients_of_single_examples_now_and_then_are_healthy() -> None:
    """Every 50 steps each of 16 examples has a backward of its own, and is thrown away."""
    torch.manual_seed(0)
    model = lora()
    optimizer = AdamW(trainable(model), lr=1e-3)
    with LoraProbeMonitor(model, optimizer, verbose=False) as probe:
        for number, batch in enumerate(batches(120)):
            if number % 50 == 30:
                for example in batches(16, size=1):
                    next_token_loss(model, example, number).backward()
                    optimizer.zero_grad()
            next_token_loss(model, batch, number).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert probe.report.status == "healthy", probe.report
    assert not probe.report.with_status("warn")
