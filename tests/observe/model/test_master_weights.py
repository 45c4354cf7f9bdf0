"""Optimizers that hold copies of the adapter: mixed precision by hand is healthy, a deep copy trains nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.training import (
    Loop,
    Training,
    Watched,
    assert_found,
    assert_healthy,
    batches,
    config,
    llama,
    lora,
    next_token_loss,
    trainable,
    trained,
    watch,
)
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import SGD, AdamW, Optimizer

from lora_probe_callbacks import LoraProbeError, LoraProbeMonitor

HALF = {"dtype": torch.bfloat16}


@dataclass
class Masters:
    """Copies of what trains, and what a loop does with them.

    Attributes:
        model: Whose tensors.
        flat: One flat copy of all of them.
        feeds: Copies the gradients before the step.
        writes_back: Copies the values after the step.
        delay: Steps by which the values come late, as where a CPU steps beside the GPU.
    """

    model: nn.Module
    flat: bool = False
    feeds: bool = True
    writes_back: bool = True
    delay: int = 0
    _waiting: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        values = [p.detach().float().clone() for p in trainable(self.model)]
        self.masters = [nn.Parameter(v) for v in ([_flatten_dense_tensors(values)] if self.flat else values)]

    def feed(self) -> None:
        if self.feeds:
            gradients = [p.grad.float() for p in trainable(self.model)]
            for master, gradient in zip(
                self.masters, [_flatten_dense_tensors(gradients)] if self.flat else gradients, strict=True
            ):
                master.grad = gradient

    @torch.no_grad()
    def write_back(self) -> None:
        own = trainable(self.model)
        values = _unflatten_dense_tensors(self.masters[0], own) if self.flat else self.masters
        self._waiting.append([v.detach().clone() for v in values])
        if self.writes_back and len(self._waiting) > self.delay:
            for parameter, value in zip(own, self._waiting.pop(0), strict=True):
                parameter.copy_(value)

    def clear(self) -> None:
        for tensor in (*self.masters, *trainable(self.model)):
            tensor.grad = None


def plain(
    masters: Masters,
    optimizer: Optimizer,
    loss: Callable[[nn.Module, Tensor, int], Tensor] = next_token_loss,
    steps: int = 6,
) -> Watched:
    """A plain loop with copies."""
    probe = LoraProbeMonitor(masters.model, optimizer, verbose=False, every_n_steps=1)
    error = None
    try:
        with probe:
            for number, batch in enumerate(batches(steps)):
                loss(masters.model, batch, number).backward()
                masters.feed()
                optimizer.step()
                masters.write_back()
                masters.clear()
    except LoraProbeError as raised:
        error = raised
    assert not probe.report.internal_errors, probe.report.internal_errors
    return Watched(probe.report, error)


def half() -> nn.Module:
    return get_peft_model(llama(torch.bfloat16), config(), autocast_adapter_dtype=False)


# --- healthy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "how"),
    [
        (half, {}),
        (half, {"flat": True}),
        (lora, {}),  # PEFT's float32 adapter: the same loop, for nothing
        (half, {"delay": 1}),
        (half, {"delay": 1, "flat": True}),
        (lambda: lora(modules_to_save=["lm_head"]), {"flat": True}),
    ],
)
def test_copies_that_are_fed_and_written_back_are_healthy(model: Callable[[], nn.Module], how: dict[str, Any]) -> None:
    masters = Masters(model(), **how)
    watched = plain(masters, AdamW(masters.masters, lr=1e-3))
    assert_healthy(watched)
    status = {f.code: f.status for f in watched.report.findings}
    assert {status[code] for code in ("LP201", "LP202", "LP208", "LP302")} == {"pass"}
    assert watched.report.metrics["lora_probe/identity/optimizer_coverage"] == 1.0


def test_first_batch_without_a_signal_is_healthy() -> None:
    masters = Masters(half())
    watched = plain(masters, SGD(masters.masters, lr=0.1), lambda m, b, step: next_token_loss(m, b, step) * (step > 1))
    assert_healthy(watched)


class ByHand(Loop):
    """Lightning's manual optimization with copies."""

    def __init__(self, masters: Masters) -> None:
        super().__init__(Training(masters.model))
        self.automatic_optimization = False
        self.masters = masters

    def configure_optimizers(self) -> Any:
        return AdamW(self.masters.masters, lr=1e-3)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = next_token_loss(self.model, batch, batch_idx)
        self.manual_backward(loss)
        self.masters.feed()
        self.optimizers().step()
        self.masters.write_back()
        self.masters.clear()
        return loss


def test_manual_optimization_with_copies_is_healthy() -> None:
    assert_healthy(watch(ByHand(Masters(half())), 6, every_n_steps=1))


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_copies_that_nothing_writes_back_fail_after_three_steps(flat: bool) -> None:
    masters = Masters(half(), flat=flat, writes_back=False)
    watched = plain(masters, AdamW(masters.masters, lr=1e-3))
    assert_found(
        watched, "LP202", 3, f"{1 if flat else 8} tensors that the model does not hold", "nothing writes them back"
    )


def test_manual_optimization_without_the_way_back_fails() -> None:
    watched = watch(ByHand(Masters(half(), writes_back=False)), 6, every_n_steps=1)
    assert_found(watched, "LP202", 3, "nothing writes them back")


@pytest.mark.parametrize("flat", [False, True])
def test_copies_that_nothing_feeds_fail_in_the_first_step(flat: bool) -> None:
    masters = Masters(half(), flat=flat, feeds=False)
    watched = plain(masters, AdamW(masters.masters, lr=1e-3))
    assert_found(watched, "LP202", 0, "the adapter got gradients, and the copies none")


def test_optimizer_of_a_deep_copy_fails_in_the_first_step() -> None:
    model = half()
    optimizer = AdamW(trainable(copy.deepcopy(model)), lr=1e-3)
    assert_found(plain(Masters(model, feeds=False, writes_back=False), optimizer), "LP202", 0, "copies none")


def test_copies_from_before_a_restore_are_known_at_once() -> None:
    """They would put the adapter back to its start with the first step."""
    masters = Masters(half())
    trained(masters.model)
    watched = plain(masters, AdamW(masters.masters, lr=1e-3))
    assert_found(watched, "LP202", 0, "they were replaced after it was built, or belong to another model")


def test_rate_of_zero_is_left_to_its_own_check() -> None:
    masters = Masters(half())
    assert_found(plain(masters, AdamW(masters.masters, lr=0.0)), "LP208", 3, "learning rate is exactly 0")


def test_zero_gradients_are_left_to_their_own_check() -> None:
    masters = Masters(half())
    watched = plain(masters, SGD(masters.masters, lr=0.1), lambda m, b, step: next_token_loss(m, b, step) * 0)
    assert_found(watched, "LP303", 3, "every adapter gradient is exactly zero")
