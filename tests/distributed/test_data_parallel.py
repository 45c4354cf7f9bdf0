"""Two processes under DistributedDataParallel: public faults are found on all ranks, healthy runs are quiet."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.processes import Outcome, assert_all_found, assert_all_healthy, batch_of, in_processes, loop
from support.training import adamw, config, llama, lora, trainable
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lora_probe_callbacks import LoraProbeWarning
from lora_probe_callbacks.estimators import VarianceProbe

pytestmark = pytest.mark.timeout(120)
SCENARIOS: dict[str, Any] = {}


def scenario(function: Any) -> Any:
    SCENARIOS[function.__name__] = function
    return function


@scenario
def healthy(rank: int, world: int) -> Outcome:
    model = DistributedDataParallel(lora())
    return loop(model, adamw(model), rank, every_n_steps=3, steps=8)


@scenario
def healthy_accumulation(rank: int, world: int) -> Outcome:
    model = DistributedDataParallel(lora())

    def around(step: int, micro: int) -> Any:
        return model.no_sync() if micro < 2 else nullcontext()

    return loop(model, adamw(model), rank, accumulate=3, around=around)


@scenario
def healthy_with_unused_outputs(rank: int, world: int) -> Outcome:
    model = DistributedDataParallel(lora(), find_unused_parameters=True)
    return loop(model, adamw(model), rank)


def log_likelihood(module: nn.Module, batch: Any) -> Tensor:
    ids = batch["input_ids"] if isinstance(batch, dict) else batch
    log_p = module(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return log_p.gather(-1, ids[:, 1:, None])[..., 0].mean(1)


@scenario
def healthy_with_an_estimator(rank: int, world: int) -> Outcome:
    """One rank runs out of memory at every turn, the last time before it could wait for a batch."""
    model = DistributedDataParallel(lora())

    def loss(module: nn.Module, batch: Any) -> Tensor:
        if rank == 1:
            raise torch.OutOfMemoryError("out of memory")
        return log_likelihood(module, batch)

    estimator = VarianceProbe(0.9, loss, every_n_steps=3)

    def before(step: int) -> None:
        if step == 6 and rank == 1:
            estimator.direction_of = lambda *_: 1 / 0

    # Beyond the first steps nothing but the estimator is due.
    intent: dict[str, Any] = {"every_n_steps": 100, "ignore": ("LP902",), "estimator": estimator}
    return loop(model, adamw(model), rank, steps=9, before=before, **intent)


@scenario
def estimator_on_a_copy_on_one_rank(rank: int, world: int) -> Outcome:
    model = DistributedDataParallel(lora())
    other = lora()
    probe = VarianceProbe(
        lambda step: batch_of(rank, 99, size=4),
        lambda module, batch: log_likelihood(other if rank == 1 else module, batch),
        every_n_steps=5,
    )
    return loop(model, adamw(model), rank, steps=9, every_n_steps=100, estimator=probe)


@scenario
def healthy_compiled_inside(rank: int, world: int) -> Outcome:
    model = DistributedDataParallel(torch.compile(lora(), backend="eager"))
    return loop(model, adamw(model), rank)


@scenario
def healthy_wrapped_in_a_module(rank: int, world: int) -> Outcome:
    """As a LightningModule holds its model, below the wrapper and above the adapter."""
    model = DistributedDataParallel(Holder(lora()))
    return loop(model, adamw(model), rank)


@scenario
def healthy_wrapper_inside_a_module(rank: int, world: int) -> Outcome:
    model = Holder(DistributedDataParallel(lora()))
    return loop(model, adamw(model), rank)


@scenario
def inner_module_of_a_holder_called(rank: int, world: int) -> Outcome:  # L01
    model = DistributedDataParallel(Holder(torch.compile(lora(), backend="eager")))
    return loop(model, adamw(model), rank, called=model.module)


@scenario
def no_sync_left_late(rank: int, world: int) -> Outcome:  # L04
    """Under "warn" the run goes on, and the tensors differ for ever; no_sync is left again in step 3."""
    model = DistributedDataParallel(lora())

    def around(step: int, micro: int) -> Any:
        return model.no_sync() if step < 3 else nullcontext()

    return warned(model, rank, around=around)


@scenario
def inner_module_called_from_step_5(rank: int, world: int) -> Outcome:  # L01
    """Between two probed steps: when it is seen, the tensors differ as well."""
    model = DistributedDataParallel(lora())
    ran = {"step": 0}

    class Called(nn.Module):
        def forward(self, **batch: Any) -> Any:
            return (model if ran["step"] < 5 else model.module)(**batch)

    return warned(model, rank, steps=10, called=Called(), before=lambda step: ran.update(step=step))


@scenario
def values_changed_on_one_rank(rank: int, world: int) -> Outcome:
    """The neighbour's fault: gradients go on to be reduced, and no later decision makes a second finding of it."""
    model = DistributedDataParallel(lora())

    def before(step: int) -> None:
        for tensor in model.parameters() if step == 2 and rank else ():
            if tensor.requires_grad:
                tensor.data.normal_()

    return warned(model, rank, before=before)


@scenario
def gradients_thrown_away_on_one_rank(rank: int, world: int) -> Outcome:
    """At the end no gradient is there to say why tensors differ."""
    model = DistributedDataParallel(lora())

    def before_step(step: int) -> None:
        for tensor in trainable(model) if rank else ():
            tensor.grad = None

    return warned(model, rank, before_step=before_step)


class Holder(nn.Module):
    """A module around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)


def warned(model: nn.Module, rank: int, **changes: Any) -> Outcome:
    """The run goes on after what is found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraProbeWarning)
        return loop(model, adamw(model), rank, on_failure="warn", every_n_steps=3, **changes)


@scenario
def inner_module_called(rank: int, world: int) -> Outcome:  # L01
    model = DistributedDataParallel(lora())
    return loop(model, adamw(model), rank, called=model.module)


@scenario
def activated_after_wrapping(rank: int, world: int) -> Outcome:  # L02
    inner = lora()
    inner.add_adapter("b", config())
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    inner.set_adapter("b")
    return loop(model, adamw(model), rank)


@scenario
def added_after_wrapping(rank: int, world: int) -> Outcome:  # L02
    inner = lora()
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    torch.manual_seed(rank)
    inner.add_adapter("b", config())
    inner.set_adapter("b")
    return loop(model, adamw(model), rank)


@scenario
def no_sync_never_left(rank: int, world: int) -> Outcome:  # L04
    model = DistributedDataParallel(lora())
    return loop(model, adamw(model), rank, around=lambda step, micro: model.no_sync())


@scenario
def no_wrapper_other_seeds(rank: int, world: int) -> Outcome:  # L06
    base = llama()
    torch.manual_seed(rank)
    model = get_peft_model(base, config())
    return loop(model, adamw(model), rank)


@scenario
def other_seeds_reduced_by_hand(rank: int, world: int) -> Outcome:  # L06
    base = llama()
    torch.manual_seed(rank)
    model = get_peft_model(base, config())

    def reduce(step: int) -> None:
        for tensor in trainable(model):
            torch.distributed.all_reduce(tensor.grad)

    return loop(model, adamw(model), rank, before_step=reduce)


@scenario
def healthy_reduced_by_hand(rank: int, world: int) -> Outcome:
    model = lora()

    def reduce(step: int) -> None:
        for tensor in trainable(model):
            torch.distributed.all_reduce(tensor.grad)

    return loop(model, adamw(model), rank, before_step=reduce)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return in_processes(SCENARIOS, 2, Path(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("healthy")])
def test_healthy_run_is_quiet(outcomes: dict[str, list[Any]], name: str) -> None:
    assert_all_healthy(outcomes[name])


def test_estimator_that_fails_on_one_rank_is_no_hang(outcomes: dict[str, list[Any]]) -> None:
    estimated, failed = outcomes["healthy_with_an_estimator"]
    assert_all_healthy([estimated, failed])
    assert estimated.metrics["lora_probe/estimator/count"] == 2
    assert "lora_probe/estimator/count" not in failed.metrics
    assert failed.statuses["LP305"][1].startswith("could not judge")
    assert estimated.statuses["LP701"][0] == failed.statuses["LP701"][0] == "pass"


def test_estimator_on_a_copy_on_one_rank_is_found_on_all(outcomes: dict[str, list[Any]]) -> None:
    assert_all_found(outcomes["estimator_on_a_copy_on_one_rank"], "LP205", 0, "fail", "runs on another module")


@pytest.mark.parametrize(
    ("name", "code", "status", "words"),
    [
        ("inner_module_called", "LP702", "fail", "whose own forward never ran"),
        ("activated_after_wrapping", "LP703", "fail", "8 adapter tensors are not managed by DistributedDataParallel"),
        ("added_after_wrapping", "LP703", "fail", "8 adapter tensors are not managed by DistributedDataParallel"),
        ("no_sync_never_left", "LP702", "fail", "no_sync"),
        ("inner_module_of_a_holder_called", "LP702", "fail", "whose own forward never ran"),
        ("no_wrapper_other_seeds", "LP701", "warn", "each rank trains its own adapter"),
    ],
)
def test_fault_is_found_on_all_ranks(
    outcomes: dict[str, list[Any]], name: str, code: str, status: str, words: str
) -> None:
    assert_all_found(outcomes[name], code, 0, status, words)


def test_tensors_that_differ_although_gradients_agree_fail(outcomes: dict[str, list[Any]]) -> None:
    assert_all_found(outcomes["other_seeds_reduced_by_hand"], "LP701", 0, "fail", "different adapter tensors")


@pytest.mark.parametrize(
    ("name", "code", "step"),
    [
        ("no_sync_left_late", "LP702", 0),
        ("inner_module_called_from_step_5", "LP702", 6),
        ("values_changed_on_one_rank", "LP701", 2),
        ("gradients_thrown_away_on_one_rank", "LP302", 0),
    ],
)
def test_one_fault_is_one_finding_in_a_run_that_goes_on(
    outcomes: dict[str, list[Any]], name: str, code: str, step: int
) -> None:
    for one in outcomes[name]:
        assert isinstance(one, Outcome), one
        assert (one.found, one.error, one.internal) == ([(code, "fail", step)], "", []), one.messages
