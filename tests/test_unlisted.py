"""Faults that no list holds are found as well: the mechanism is observed, not the recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.recipes import Recipe, parameters
from support.training import (
    Loop,
    Training,
    adamw,
    adapter_tensors,
    assert_found,
    assert_healthy,
    llama,
    lora,
    next_token_loss,
    watch,
)
from support.unlisted import UNLISTED
from support.unlisted_declared import DECLARED
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lora_probe_callbacks import LoraProbeError


@pytest.mark.parametrize("recipe", parameters(UNLISTED + DECLARED))
def test_unlisted_fault_is_reported(recipe: Recipe) -> None:
    watched = watch(recipe.build(), recipe.steps, every_n_steps=1, **recipe.intent)
    assert_found(watched, recipe.code, recipe.step, *recipe.words, status=recipe.status, evidence=recipe.evidence)
    assert isinstance(watched.error, LoraProbeError) == (recipe.status == "fail"), watched.error


# --- gradients that are gone when the optimizer steps -------------------------------------------


class Clearing(Loop):
    """``zero_grad`` between backward() and step()."""

    def __init__(self, run: Training, when: str, *, set_to_none: bool) -> None:
        super().__init__(run)
        self.when, self.to_none = when, set_to_none

    def clear(self, when: str) -> None:
        if when == self.when:
            self.trainer.optimizers[0].zero_grad(set_to_none=self.to_none)

    def on_after_backward(self) -> None:
        self.clear("after backward")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.clear("before step")


@pytest.mark.parametrize(
    ("when", "set_to_none", "code", "step", "words"),
    [
        ("after backward", True, "LP302", 0, "got no gradient (None)"),
        ("after backward", False, "LP303", 3, "exactly zero"),
        # The module's own hook comes after the callback's: the gradients were there, and the step did nothing.
        ("before step", True, "LP401", 3, "no step has moved the adapter"),
        ("before step", False, "LP401", 3, "no step has moved the adapter"),
    ],
)
def test_gradients_cleared_between_backward_and_step(
    when: str, set_to_none: bool, code: str, step: int, words: str
) -> None:
    model = lora()
    run = Training(model, optimizer=adamw(model, weight_decay=0.0))
    watched = watch(Clearing(run, when, set_to_none=set_to_none), every_n_steps=1)
    assert_found(watched, code, step, words)
    if code == "LP401" and set_to_none:
        assert "gone when step() returned" in str(watched.report.failures[0].evidence["got"])


# --- manual optimization ------------------------------------------------------------------------


class Manual(Loop):
    """The adapter and the head each have an optimizer, and the loop steps one of them."""

    def __init__(self, *, stepped: int, clear_all: bool) -> None:
        base = llama()
        model = lora(base=base)
        base.lm_head.requires_grad_(True)
        super().__init__(Training(model))
        self.automatic_optimization = False
        self.stepped, self.clear_all = stepped, clear_all

    def configure_optimizers(self) -> Any:
        adapter = AdamW(list(adapter_tensors(self.model).values()), lr=1e-3)
        head = AdamW(list(self.model.get_base_model().lm_head.parameters()), lr=1e-3)
        return [adapter, head]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        optimizers = self.optimizers()
        optimizer = optimizers[self.stepped]
        loss = next_token_loss(self.model, batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        for other in optimizers if self.clear_all else [optimizer]:
            other.zero_grad()
        return loss


def test_other_optimizer_stepped_and_all_gradients_cleared() -> None:
    """A critic's warm-up looks the same for some steps: judged after sixteen, or when the run has ended."""
    watched = watch(Manual(stepped=1, clear_all=True), steps=12, every_n_steps=1)
    assert_found(watched, "LP401", 11, "no optimizer that owns the adapter has stepped: 12 backward passes")
    watched = watch(Manual(stepped=1, clear_all=True), steps=20, every_n_steps=1)
    assert_found(watched, "LP401", 16, "no optimizer that owns the adapter has stepped")


def test_other_optimizer_stepped_and_the_adapters_gradients_left() -> None:
    """Indistinguishable from an accumulation that has not ended, until the run has."""
    watched = watch(Manual(stepped=1, clear_all=False), steps=24, every_n_steps=1)
    assert_found(watched, "LP401", 0, "no optimizer that owns the adapter has stepped")


class Swallowing(Loop):
    """A loop that takes every exception for a bad batch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        try:
            return super().training_step(batch, batch_idx)
        except Exception:
            return None


def test_swallowed_error_is_raised_again() -> None:
    model = lora(hook=True)
    model.merge_adapter()
    watched = watch(Swallowing(Training(model)), every_n_steps=1)
    assert isinstance(watched.error, LoraProbeError)
    assert_found(watched, "LP103", 0)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(12, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x) + self.experts[1](x)


@pytest.mark.parametrize(("steps", "found"), [(60, []), (102, [("LP104", "warn", 100)])])
def test_expert_without_a_token_is_warned_of_after_a_hundred_steps(steps: int, found: list[Any]) -> None:
    """Nothing runs there, for good reasons or bad: time alone tells, and it only warns."""
    torch.manual_seed(0)
    model = get_peft_model(Experts(), LoraConfig(r=2, target_modules=["0", "1", "2"]))
    run = Training(model, lambda model, batch, step: model(batch.float()).pow(2).mean())
    watched = watch(run, steps, every_n_steps=1)
    assert watched.found == found
    idle = next(f for f in watched.report.findings if f.code == "LP104")
    assert idle.status == ("warn" if found else "pending")
    assert not found or "experts.2" in idle.message


def test_hook_that_zeroes_the_gradients_of_one_layer() -> None:
    """A part may stand at zero for long; after a hundred steps or so it is warned of."""
    model = lora()
    for name, tensor in adapter_tensors(model).items():
        if "layers.0" in name and "q_proj" in name:
            tensor.register_hook(torch.zeros_like)
    run = Training(model, optimizer=adamw(model, weight_decay=0.0))
    watched = watch(run, 106, every_n_steps=1)
    assert [f[:2] for f in watched.found] == [("LP303", "warn")], watched.found
    assert "layers.0" in watched.report.with_status("warn")[0].message


def test_head_warmed_up_alone_is_healthy() -> None:
    """The look-alike of a forward that should not be under no_grad."""
    base = llama()
    model = lora(base=base)
    base.lm_head.requires_grad_(True)

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            hidden = model.get_base_model().model(input_ids=batch)[0]
        return base.lm_head(hidden).pow(2).mean() if step < 6 else next_token_loss(model, batch, step)

    assert_healthy(watch(Training(model, loss), 10, every_n_steps=1))
