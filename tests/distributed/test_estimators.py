"""A VarianceProbe on two ranks: bit-equal training, no reduction of its own, no hang; together one process."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Outcome, assert_all_healthy, batch_of, in_processes, loop
from support.training import adamw, adapter_tensors, lora, trainable, trained
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_probe_callbacks.estimators import (
    ConditionalVariance,
    UpdateDirection,
    VarianceProbe,
    conditional_variance,
    per_prompt_projection,
)

pytestmark = pytest.mark.timeout(120)
SCENARIOS: dict[str, Any] = {}
DELTA = "lora_probe/estimator/delta_1"


def scenario(function: Any) -> Any:
    SCENARIOS[function.__name__] = function
    return function


def model() -> nn.Module:
    made = lora()
    torch.manual_seed(0)
    trained(made)
    return made


def nll(module: nn.Module, batch: Any) -> Tensor:
    """The negative log-likelihood of each row, [B]."""
    ids = batch["input_ids"] if isinstance(batch, dict) else batch
    log_p = module(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None])[..., 0].mean(1)


def weights(made: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in adapter_tensors(made).items()}


def with_and_without(rank: int, estimator: VarianceProbe, **options: Any) -> Outcome:
    """The outcome with the estimator; ``extra`` names what differs from the run without a probe."""
    after, probed = [], None
    for given in (None, estimator):
        wrapped = DistributedDataParallel(model(), **options)
        made = loop(wrapped, adamw(wrapped), rank, estimator=given, every_n_steps=4, ignore=("LP902",))
        probed = made if given is not None else None
        after.append(weights(wrapped))
    assert probed is not None
    probed.extra = [name for name, tensor in after[0].items() if not torch.equal(tensor, after[1][name])]
    return probed


@scenario
def own_batches(rank: int, world: int) -> Outcome:
    return with_and_without(rank, VarianceProbe(lambda step: batch_of(rank, 900 + step, 4), nll, every_n_steps=2))


@scenario
def share_of_the_batch(rank: int, world: int) -> Outcome:
    """Its steps are probed off the cadence, on all ranks alike."""
    return with_and_without(rank, VarianceProbe(0.5, nll, every_n_steps=5))


@scenario
def static_graph(rank: int, world: int) -> Outcome:
    """DDP counts the hooks of its first backward."""
    probe = VarianceProbe(lambda step: batch_of(rank, 900 + step, 4), nll, "from_gradients", every_n_steps=2)
    return with_and_without(rank, probe, static_graph=True)


@scenario
def estimator_of_one_rank_raises(rank: int, world: int) -> Outcome:
    def batches(step: int) -> Tensor:
        if rank and step == 2:
            raise ValueError("no batch today")
        return batch_of(rank, 900 + step, 4)

    return with_and_without(rank, VarianceProbe(batches, nll, every_n_steps=2))


@scenario
def share_fails_on_one_rank(rank: int, world: int) -> Outcome:
    """No direction on one rank: it still exchanges at the step whose batch the others borrow."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        if rank:
            raise ValueError("not on this rank")
        return nll(module, batch)

    return with_and_without(rank, VarianceProbe(0.5, loss, every_n_steps=5))


@scenario
def fully_sharded(rank: int, world: int) -> Outcome:
    made = model()
    mesh = init_device_mesh("cpu", (world,))
    for layer in made.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    return loop(made, adamw(made), rank, estimator=VarianceProbe([batch_of(0, 1)], nll, every_n_steps=2))


@scenario
def flattened_views(rank: int, world: int) -> Outcome:
    made = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    return loop(made, adamw(made), rank, estimator=VarianceProbe([batch_of(0, 1)], nll, every_n_steps=2))


def projections(made: nn.Module, batch: Tensor, direction: UpdateDirection) -> Tensor:
    return per_prompt_projection(made, lambda module: nll(module, batch), direction)


@scenario
def pooled(rank: int, world: int) -> dict[str, Any]:
    """The gradient that DDP has averaged is the direction; every rank projects its own prompts."""
    made = model().double()
    wrapped = DistributedDataParallel(made)
    nll(wrapped, batch_of(rank, 0)).mean().backward()
    direction = UpdateDirection.from_gradients(wrapped, lr=0.1)
    metric = ConditionalVariance()
    metric.update(projections(wrapped, batch_of(rank, 1), direction))
    return {"moments": [float(x) for x in metric.compute()], "norm": direction.norm(), "scale": direction.scale}


@scenario
def projections_through_ddp(rank: int, world: int) -> dict[str, float]:
    """How far the wrapper's projections are from the module's own, and its gradients from those before."""
    made = model().double()
    wrapped = DistributedDataParallel(made)
    batch = batch_of(rank, 0, 4)
    nll(wrapped, batch).sum().backward()
    gradients = [tensor.grad.clone() for tensor in trainable(made)]
    direction = UpdateDirection.from_gradients(wrapped, lr=0.1)
    expected = per_prompt_projection(made, lambda module: nll(module, batch), direction, backend="loop")

    def error(s: Tensor) -> float:
        return float((s - expected).norm() / expected.norm())

    given = error(per_prompt_projection(wrapped, lambda module: nll(module, batch), direction, self_check="always"))
    through = error(per_prompt_projection(wrapped, lambda module: nll(wrapped, batch), direction))
    kept = all(torch.equal(tensor.grad, was) for tensor, was in zip(trainable(made), gradients, strict=True))
    wrapped.zero_grad()
    nll(wrapped, batch).sum().backward()
    after = max(float((tensor.grad - was).abs().max()) for tensor, was in zip(trainable(made), gradients, strict=True))
    return {"given": given, "through": through, "kept": kept, "after": after, "norm": direction.norm()}


@scenario
def metric_over_ranks(rank: int, world: int) -> list[list[float]]:
    s = values()
    metric = ConditionalVariance()
    for part in (s[:30], s[30:])[rank].split(7):
        metric.update(part)
    first = metric.compute()
    metric.update(torch.full((2,), 1e6, dtype=torch.float64))  # accumulation goes on after a synchronised compute
    return [[float(x) for x in moments] for moments in (first, metric.compute())]


def values() -> Tensor:
    """Far from zero and close together, where a naive sum of squares loses every digit, [101]."""
    return 1e6 + torch.randn(101, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return in_processes(SCENARIOS, 2, Path(tmp_path_factory.mktemp("estimators")))


@pytest.mark.parametrize("name", ["own_batches", "share_of_the_batch", "static_graph"])
def test_training_is_bit_equal_under_ddp(outcomes: dict[str, list[Any]], name: str) -> None:
    assert_all_healthy(outcomes[name])
    for one in outcomes[name]:
        assert one.extra == []
        assert DELTA in one.metrics
        assert one.statuses["LP701"][0] == "pass"
    first, second = (one.metrics[DELTA] for one in outcomes[name])
    assert first != second  # each rank estimates from its own prompts


@pytest.mark.parametrize("name", ["estimator_of_one_rank_raises", "share_fails_on_one_rank"])
def test_failure_on_one_rank_neither_hangs_nor_parts_the_ranks(outcomes: dict[str, list[Any]], name: str) -> None:
    assert_all_healthy(outcomes[name])
    assert DELTA in outcomes[name][0].metrics
    for one in outcomes[name]:
        assert one.extra == []
        assert one.statuses["LP701"][0] == "pass"


@pytest.mark.parametrize("name", ["fully_sharded", "flattened_views"])
def test_shards_are_not_estimated_on(outcomes: dict[str, list[Any]], name: str) -> None:
    assert_all_healthy(outcomes[name])
    for one in outcomes[name]:
        assert DELTA not in one.metrics
        status, reason = one.statuses["LP304"]
        assert (status, "in shards over several ranks" in reason) == ("skipped", True), reason


def test_ranks_together_are_one_process_on_the_joined_batch(outcomes: dict[str, list[Any]]) -> None:
    made = model().double()
    u_batch, e_batch = (torch.cat([batch_of(rank, step) for rank in range(2)]) for step in range(2))
    nll(made, u_batch).mean().backward()
    direction = UpdateDirection.from_gradients(made, lr=0.1)
    s = projections(made, e_batch, direction)
    expected = {
        "moments": [float(s.mean()), float(s.var()), float(conditional_variance(s, 1.0)) ** 0.5, 4.0],
        "norm": direction.norm(),
        "scale": direction.scale,
    }
    assert len(trainable(made)) == 8
    for one in outcomes["pooled"]:
        assert one["moments"] == pytest.approx(expected["moments"], rel=1e-9)
        assert one["norm"] == pytest.approx(expected["norm"], rel=1e-9)


def test_projections_leave_the_reducer_of_ddp_as_it_was(outcomes: dict[str, list[Any]]) -> None:
    for one in outcomes["projections_through_ddp"]:
        assert isinstance(one, dict), one
        assert one["given"] < 1e-10
        assert one["through"] < 1e-10
        assert one["kept"]
        assert one["after"] < 1e-12  # it still works, and still averages
    first, second = outcomes["projections_through_ddp"]
    assert first["norm"] == second["norm"] > 0


def test_a_metric_over_ranks_is_one_exact_pass(outcomes: dict[str, list[Any]]) -> None:
    s = values()
    first, second = outcomes["metric_over_ranks"]
    assert first == second
    for moments, joined in zip(first, (s, torch.cat([s, torch.full((4,), 1e6, dtype=torch.float64)])), strict=True):
        variance = statistics.variance(joined.tolist())  # summed in rational numbers
        expected = [statistics.mean(joined.tolist()), variance, (variance / len(joined)) ** 0.5, len(joined)]
        assert moments == pytest.approx(expected, rel=1e-9, abs=0)
