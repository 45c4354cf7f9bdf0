"""Two processes: rank 0 writes and reads, and all ranks come to one verdict."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from support.processes import Outcome, assert_all_found, assert_all_healthy, in_processes, loop
from support.training import adamw, adapter_tensors, lora
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

pytestmark = pytest.mark.timeout(120)
SCENARIOS: dict[str, Any] = {}


def scenario(function: Any) -> Any:
    SCENARIOS[function.__name__] = function
    return function


class Saving:
    """Saves after the third step, on rank 0 alone, and asks the probe."""

    def __init__(self, rank: int, save: Any) -> None:
        self.rank, self.save, self.calls = rank, save, 0
        self.folder = Path(tempfile.mkdtemp())

    def __call__(self, probe: Any) -> Any:
        self.calls += 1
        if self.calls != 3:
            return None
        self.save(self.folder, self.rank)
        if self.rank:
            return None
        return [(f.code, f.status) for f in probe.check_saved(self.folder).findings]


def ddp(rank: int, save: Any) -> Outcome:
    model = DDP(lora())
    optimizer = adamw(model)
    return loop(model, optimizer, rank, during=Saving(rank, lambda *args: save(model, *args)), every_n_steps=1)


@scenario
def healthy_save_on_rank_0(rank: int, world: int) -> Outcome:
    def save(model: nn.Module, folder: Path, rank: int) -> None:
        if rank == 0:
            model.module.save_pretrained(folder)

    return ddp(rank, save)


@scenario
def names_of_the_wrapper(rank: int, world: int) -> Outcome:
    def save(model: nn.Module, folder: Path, rank: int) -> None:
        if rank == 0:
            model.module.save_pretrained(folder)
            state = {k.replace(".default", ""): v for k, v in model.state_dict().items() if "lora_" in k}
            save_file(state, folder / "adapter_model.safetensors")

    return ddp(rank, save)


def resumed(rank: int, load: Any) -> Outcome:
    model = lora()
    wrapped = DDP(model)
    optimizer = adamw(wrapped)
    state: dict[str, Any] = {}
    first = loop(wrapped, optimizer, rank, steps=3, during=lambda probe: state.update(probe.state_dict()))
    assert not first.found, first.messages
    sent = [state]
    dist.broadcast_object_list(sent)  # as a checkpoint that rank 0 has written is read by all
    weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for name, tensor in adapter_tensors(model).items():
        nn.init.zeros_(tensor) if "lora_B" in name else nn.init.normal_(tensor, std=0.1)
    load(model, weights, rank)
    from lora_probe_callbacks import LoraProbeMonitor

    original = LoraProbeMonitor.__enter__

    def enter(probe: LoraProbeMonitor) -> LoraProbeMonitor:
        probe.load_state_dict(sent[0])
        return original(probe)

    LoraProbeMonitor.__enter__ = enter  # type: ignore[method-assign]
    try:
        return loop(wrapped, optimizer, rank, steps=3, every_n_steps=1)
    finally:
        LoraProbeMonitor.__enter__ = original  # type: ignore[method-assign]


@scenario
def healthy_resume(rank: int, world: int) -> Outcome:
    return resumed(rank, lambda model, weights, rank: model.load_state_dict(weights))


@scenario
def restored_on_rank_0_alone(rank: int, world: int) -> Outcome:
    return resumed(rank, lambda model, weights, rank: model.load_state_dict(weights) if rank == 0 else None)


def sharded(rank: int, world: int, save: Any) -> Outcome:
    model = lora()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return loop(model, adamw(model), rank, during=Saving(rank, lambda *args: save(model, *args)), every_n_steps=1)


def write(model: nn.Module, folder: Path, rank: int, tensors: dict[str, torch.Tensor]) -> None:
    if rank == 0:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "adapter_model.safetensors")


@scenario
def healthy_gathered_shards(rank: int, world: int) -> Outcome:
    def save(model: nn.Module, folder: Path, rank: int) -> None:
        state = get_peft_model_state_dict(model)
        write(model, folder, rank, {k: v.full_tensor() for k, v in state.items()})

    return sharded(rank, world, save)


@scenario
def shards_of_rank_0(rank: int, world: int) -> Outcome:
    def save(model: nn.Module, folder: Path, rank: int) -> None:
        state = get_peft_model_state_dict(model)
        write(model, folder, rank, {k: v.to_local() for k, v in state.items()})

    return sharded(rank, world, save)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return in_processes(SCENARIOS, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [n for n in SCENARIOS if n.startswith("healthy")])
def test_healthy(name: str, outcomes: dict[str, list[Any]]) -> None:
    assert_all_healthy(outcomes[name])


def test_save_is_judged_by_its_writer(outcomes: dict[str, list[Any]]) -> None:
    asked, other = outcomes["healthy_save_on_rank_0"]
    assert ["LP801", "pass"] in [list(pair) for pair in asked.extra]
    assert other.statuses["LP801"] == ("skipped", "not applicable: nothing was saved")
    gathered = outcomes["healthy_gathered_shards"][0].statuses["LP801"]
    assert gathered[0] == "skipped"
    assert "its names and shapes are right" in gathered[1]


def test_wrong_names_stop_all_ranks_together(outcomes: dict[str, list[Any]]) -> None:
    assert_all_found(outcomes["names_of_the_wrapper"], "LP801", 2, "fail", "module.base_model")


def test_shards_of_one_rank_are_not_the_adapter(outcomes: dict[str, list[Any]]) -> None:
    assert_all_found(outcomes["shards_of_rank_0"], "LP801", 2, "fail", "other shapes")


def test_rank_that_restored_nothing_is_named(outcomes: dict[str, list[Any]]) -> None:
    assert_all_found(outcomes["restored_on_rank_0_alone"], "LP803", 0, "fail", "adapter is fresh")
    assert all(one.evidence[0]["seen on"] == "rank 1 of 2" for one in outcomes["restored_on_rank_0_alone"])
