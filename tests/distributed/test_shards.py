"""Shards: healthy runs are quiet and their norms are those of one process; what stands beside the shards is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.processes import (
    Outcome,
    assert_all_found,
    assert_all_healthy,
    assert_all_know,
    batch_of,
    in_processes,
    loop,
)
from support.training import adamw, config, llama, lora, trainable
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

pytestmark = pytest.mark.timeout(120)
SCENARIOS: dict[str, Any] = {}
NORMS = ("gradient/norm_A", "gradient/norm_B", "update/relative_norm", "update/moved_fraction_B")


def scenario(function: Any) -> Any:
    SCENARIOS[function.__name__] = function
    return function


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=0.1)


def wide() -> nn.Module:
    """Rank 1, so that on the second process every shard of A is empty; the head's adapter belongs to the root."""
    return lora(r=1, target_modules=["q_proj", "v_proj", "lm_head"])


def sharded(model: nn.Module, layers: Any, world: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (world,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@scenario
def healthy_fully_shard(rank: int, world: int) -> Outcome:
    model = wide()
    sharded(model, model.base_model.model.model.layers, world)
    return loop(model, sgd(model), rank, during=lambda probe: dict(probe.report.metrics), every_n_steps=1)


@scenario
def healthy_evaluation(rank: int, world: int) -> Outcome:
    """After a forward without a backward the root keeps showing whole tensors, at the end of the run too."""
    model = wide()
    sharded(model, model.base_model.model.model.layers, world)

    @torch.no_grad()
    def evaluate(probe: Any) -> None:
        model.eval()
        model(input_ids=batch_of(0, 99))
        model.train()

    return loop(model, sgd(model), rank, during=evaluate, every_n_steps=1)


@scenario
def healthy_flattened_views(rank: int, world: int) -> Outcome:
    model = FullyShardedDataParallel(wide(), use_orig_params=True, device_id=torch.device("cpu"))
    return loop(model, sgd(model), rank, during=lambda probe: dict(probe.report.metrics), every_n_steps=1)


@scenario
def optimizer_before_fully_shard(rank: int, world: int) -> Outcome:  # E05
    model = lora()
    optimizer = adamw(model)
    sharded(model, model.base_model.model.model.layers, world)
    return loop(model, optimizer, rank)


@scenario
def adapter_after_fully_shard(rank: int, world: int) -> Outcome:  # L03
    base = llama()
    sharded(base, base.model.layers, world)
    torch.manual_seed(50 + rank)
    model = get_peft_model(base, config())
    return loop(model, adamw(model), rank)


@scenario
def base_trained_after_fully_shard(rank: int, world: int) -> Outcome:  # L07
    model = lora()
    sharded(model, model.base_model.model.model.layers, world)
    model.requires_grad_(True)
    return loop(model, adamw(model), rank)


@scenario
def optimizer_before_flattening(rank: int, world: int) -> Outcome:  # E04
    model = lora()
    optimizer = adamw(model)

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        own = list(module.parameters())
        return recurse or (bool(own) and all(p.requires_grad for p in own) and not list(module.children()))

    model = FullyShardedDataParallel(
        model, use_orig_params=False, auto_wrap_policy=policy, device_id=torch.device("cpu")
    )
    return loop(model, optimizer, rank)


@scenario
def all_in_flat_parameters(rank: int, world: int) -> Outcome:
    model = lora()
    model.requires_grad_(True)
    model = FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))
    return loop(model, adamw(model), rank)


@scenario
def disabled_on_one_rank(rank: int, world: int) -> Outcome:
    model = lora(hook=True)
    sharded(model, model.base_model.model.model.layers, world)

    def before(step: int) -> None:
        if step == 2 and rank == 1:
            model.disable_adapter_layers()

    return loop(model, adamw(model), rank, before=before)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return in_processes(SCENARIOS, 2, Path(tmp_path_factory.mktemp("shards")))


@pytest.fixture(scope="module")
def alone() -> Outcome:
    """One process on the joined batch."""
    torch.manual_seed(0)
    model = wide()

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.step = 0

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            ids = torch.cat([batch_of(0, self.step), batch_of(1, self.step)])
            self.step += 1
            return self.inner(input_ids=ids, labels=ids)

    joined = Joined()
    return loop(joined, sgd(joined), 0, during=lambda probe: dict(probe.report.metrics), every_n_steps=1)


@pytest.mark.parametrize("name", ["healthy_fully_shard", "healthy_flattened_views", "healthy_evaluation"])
def test_healthy_run_is_quiet(outcomes: dict[str, list[Any]], name: str) -> None:
    assert_all_healthy(outcomes[name])


@pytest.mark.parametrize("name", ["healthy_fully_shard", "healthy_flattened_views"])
@pytest.mark.parametrize("metric", NORMS)
def test_norms_are_those_of_one_process(outcomes: dict[str, list[Any]], alone: Outcome, name: str, metric: str) -> None:
    expected = alone.extra[f"lora_probe/{metric}"]
    assert expected > 0
    for outcome in outcomes[name]:
        assert outcome.extra[f"lora_probe/{metric}"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "code", "step"),
    [
        ("optimizer_before_fully_shard", "LP202", 0),
        ("adapter_after_fully_shard", "LP703", 0),
        ("base_trained_after_fully_shard", "LP206", 0),
        ("optimizer_before_flattening", "LP201", 0),
    ],
)
def test_fault_is_found_on_all_ranks(outcomes: dict[str, list[Any]], name: str, code: str, step: int) -> None:
    assert_all_found(outcomes[name], code, step)


def test_flat_parameters_are_not_judged_and_not_passed(outcomes: dict[str, list[Any]]) -> None:
    for one in outcomes["all_in_flat_parameters"]:
        assert isinstance(one, Outcome), one
        assert (one.error, {status for status, _ in one.statuses.values()}) == ("", {"skipped"})
        assert "use_orig_params=True" in one.statuses["LP101"][1]


def test_rank_that_hangs_in_a_reduction_learns_why(outcomes: dict[str, list[Any]]) -> None:
    """Without its adapter rank 1 reduces nothing, and rank 0 waits for it in its backward until the group gives up."""
    assert_all_know(outcomes["disabled_on_one_rank"], "LP102", 2)
    assert {code for one in outcomes["disabled_on_one_rank"] for code, *_ in one.found} == {"LP102"}
