"""A fault on one rank only, at every phase: no hang, and all ranks take the same decision."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import Outcome, assert_all_found, assert_all_healthy, batch_of, in_processes, loop, outcome
from support.training import adamw, adapter_tensors, lora, trainable
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from lora_probe_callbacks import LoraProbeMonitor
from lora_probe_callbacks.distributed import transport as ranks
from lora_probe_callbacks.observe.device.step_reader import DeviceReader

pytestmark = pytest.mark.timeout(200)
SCENARIOS: dict[str, Any] = {}


def scenario(function: Any) -> Any:
    SCENARIOS[function.__name__] = function
    return function


def wrapped() -> DistributedDataParallel:
    """The head is trained too: a rank that trains nothing at all leaves the others hanging in DDP's reduction."""
    return DistributedDataParallel(lora(modules_to_save=["lm_head"]), find_unused_parameters=True)


def bad(rank: int, world: int) -> bool:
    return rank == world - 1


@scenario
def start(rank: int, world: int) -> Outcome:
    model = wrapped()
    owned = trainable(model)[: 4 if bad(rank, world) else None]
    return loop(model, torch.optim.AdamW(owned, lr=1e-3), rank)


@scenario
def forward(rank: int, world: int) -> Outcome:
    model = wrapped()

    def before(step: int) -> None:
        if step == 2 and bad(rank, world):
            model.module.merge_adapter()

    return loop(model, adamw(model), rank, before=before)


@scenario
def backward(rank: int, world: int) -> Outcome:
    model = wrapped()

    def before_step(step: int) -> None:
        for tensor in trainable(model) if bad(rank, world) else ():
            tensor.grad = None

    return loop(model, adamw(model), rank, before_step=before_step)


@scenario
def step(rank: int, world: int) -> Outcome:
    model = wrapped()

    def before(step: int) -> None:
        if step == 2 and bad(rank, world):
            for tensor in adapter_tensors(model).values():
                tensor.data.normal_()

    return loop(model, adamw(model), rank, before=before)


@scenario
def skipped_step(rank: int, world: int) -> Outcome:
    model = wrapped()
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=1.0)

    def before_step(step: int) -> None:
        if step == 1 and bad(rank, world):
            trainable(model)[0].grad[0] = float("inf")

    def make(step: int) -> None:
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()

    return loop(model, optimizer, rank, before_step=before_step, step=make, scaler=scaler)


@scenario
def skipped_step_with_a_fault(rank: int, world: int) -> Outcome:
    """All ranks skip step 1, in which one is merged: decided when the next forward begins."""
    model = wrapped()
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=1.0)

    def before(step: int) -> None:
        if step == 1 and bad(rank, world):
            model.module.merge_adapter()

    def before_step(step: int) -> None:
        for tensor in trainable(model) if step == 1 else ():
            if tensor.grad is not None:
                tensor.grad.fill_(float("inf"))

    def make(step: int) -> None:
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()

    return loop(model, optimizer, rank, before=before, before_step=before_step, step=make, scaler=scaler)


@scenario
def observer_breaks(rank: int, world: int) -> Outcome:
    """The probe of one rank breaks in step 1; in step 3 another rank finds a fault."""
    model = wrapped()
    receive = DeviceReader.receive

    def before(step: int) -> None:
        if step == 1 and bad(rank, world):
            DeviceReader.receive = lambda *args, **kwargs: 1 / 0
        if step == 3 and rank == 0:
            model.module.merge_adapter()

    try:
        return loop(model, adamw(model), rank, before=before)
    finally:
        DeviceReader.receive = receive


@scenario
def probe_on_one_rank(rank: int, world: int) -> Outcome:
    model = wrapped()
    if rank == 0:
        ranks.PRESENCE, former = 1.0, ranks.PRESENCE
        try:
            return loop(model, adamw(model), rank)
        finally:
            ranks.PRESENCE = former
    optimizer = adamw(model)
    for number in range(6):
        ids = batch_of(rank, number)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Outcome([], [], [], "", "", {}, {}, [], 0.0)


@scenario
def first_forward_of_one_rank_alone(rank: int, world: int) -> Outcome:
    model = wrapped()
    optimizer = adamw(model)
    with LoraProbeMonitor(model, optimizer, verbose=False) as probe:
        if rank == 0:
            ids = batch_of(9, 9)
            model.module(input_ids=ids, labels=ids)
        dist.barrier()
        for number in range(5):
            ids = batch_of(rank, number)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return outcome(probe.report, None)


@scenario
def uneven_inputs(rank: int, world: int) -> Outcome:
    model = wrapped()
    optimizer = adamw(model)
    with Join([model]), LoraProbeMonitor(model, optimizer, verbose=False) as probe:
        for number in range(3 + 2 * rank):
            ids = batch_of(rank, number)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return outcome(probe.report, None)


@scenario
def exception(rank: int, world: int) -> Outcome:
    model = wrapped()

    def after_forward(step: int) -> None:
        if step == 2 and bad(rank, world):
            raise ValueError("the user's own")

    return loop(model, adamw(model), rank, after_forward=after_forward)


@scenario
def exception_where_others_wait_in_the_exchange(rank: int, world: int) -> Outcome:
    model = wrapped()

    def before_step(step: int) -> None:
        if step == 2 and bad(rank, world):
            raise ValueError("the user's own")

    return loop(model, adamw(model), rank, before_step=before_step, steps=3)


def death(rank: int, world: int) -> Outcome:
    model = wrapped()

    def before_step(step: int) -> None:
        if step == 2 and bad(rank, world):
            os._exit(1)

    return loop(model, adamw(model), rank, before_step=before_step, steps=3)


def test_death_of_one_rank_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    """It comes in the exchange, where nothing but the group's timeout tells of it."""
    first, died = in_processes({"death": death}, 2, tmp_path, dying=1)["death"]
    assert died is None
    assert isinstance(first, Outcome), first
    assert (first.found, first.internal) == ([], [])
    assert "the ranks do not decide together" in first.statuses["LP701"][1]
    assert first.seconds < 60


@pytest.mark.parametrize("world", [2, 4])
def test_fault_on_one_rank(world: int, tmp_path: Path) -> None:
    outcomes = in_processes(SCENARIOS, world, tmp_path)
    all_take_the_same_decision(outcomes, world)
    broken_probe_of_one_rank_leaves_the_others_their_decision(outcomes)
    healthy_asymmetry_is_no_hang(outcomes)
    for name in ("exception", "exception_where_others_wait_in_the_exchange"):
        exception_on_one_rank_ends_the_wait_of_the_others(outcomes[name])


def all_take_the_same_decision(outcomes: dict[str, list[Any]], world: int) -> None:
    expected = {
        "start": ("LP201", 0),
        "forward": ("LP103", 2),
        "backward": ("LP302", 0),
        "step": ("LP701", 2),
        "skipped_step": ("LP701", 2),
        "skipped_step_with_a_fault": ("LP103", 1),
    }
    for name, (code, number) in expected.items():
        assert_all_found(outcomes[name], code, number, "fail")
    for name in ("start", "forward", "backward", "skipped_step_with_a_fault"):
        assert all(one.evidence[0]["seen on"] == f"rank {world - 1} of {world}" for one in outcomes[name])


def broken_probe_of_one_rank_leaves_the_others_their_decision(outcomes: dict[str, list[Any]]) -> None:
    *others, broken = outcomes["observer_breaks"]
    assert_all_found(others, "LP103", 3)
    assert "ZeroDivisionError" in broken.internal[0]
    assert (broken.found, broken.error) == ([("LP103", "fail", 3)], "LoraProbeError")


def healthy_asymmetry_is_no_hang(outcomes: dict[str, list[Any]]) -> None:
    for name in ("probe_on_one_rank", "first_forward_of_one_rank_alone", "uneven_inputs"):
        assert_all_healthy(outcomes[name])
    assert "not every rank runs a probe" in outcomes["probe_on_one_rank"][0].statuses["LP701"][1]
    assert "uneven" in outcomes["uneven_inputs"][0].statuses["LP701"][1]
    met = outcomes["first_forward_of_one_rank_alone"][0].statuses["LP701"]
    assert met[0] == "pass", met


def exception_on_one_rank_ends_the_wait_of_the_others(outcomes: list[Any]) -> None:
    *others, raised = outcomes
    assert raised.error == "ValueError"
    assert not raised.found
    for one in others:
        assert isinstance(one, Outcome), one
        assert one.found == []
        assert not one.internal
        assert one.seconds < 60
