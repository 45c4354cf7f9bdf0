"""Training methods that handle tensors, steps or forwards in their own way."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from peft import get_peft_model
from support.tiny import (
    QUIET,
    Batches,
    Task,
    adamw,
    assert_healthy,
    judged,
    language_loss,
    llama,
    lora,
    peft_llama,
    token_batches,
)
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lora_probe_callbacks import LoraProbe


def trainable(task: nn.Module) -> list[nn.Parameter]:
    return [p for p in task.parameters() if p.requires_grad]


class Validated(Task):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("loss", language_loss(self, batch, batch_idx))


def test_layer_drop():
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.out = nn.Linear(8, 16), nn.Linear(16, 1)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inside(x)
            for index, layer in enumerate(self.layers):
                if index == 0 or torch.rand(()) > 0.5:
                    h = h + layer(h)
            return self.out(h)

    torch.manual_seed(0)
    model = get_peft_model(Drops(), lora(target_modules=["layers.0.0", "layers.1.0", "layers.2.0"]))
    batches = Batches(list(torch.randn(30, 4, 8, generator=torch.Generator().manual_seed(1))))
    assert_healthy(judged(Task(model, lambda task, x, _: (task.model(x) - 1).square().mean()), batches))


@pytest.mark.parametrize("block", [1, 5])
def test_a_and_b_are_trained_in_turns(block):
    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        for name, tensor in task.model.named_parameters():
            if "lora_" in name:
                tensor.requires_grad_(("lora_B" in name) == (index // block % 2 == 0))
        return language_loss(task, ids, index)

    def optimizers(task: Task) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for n, p in task.named_parameters() if "lora_" in n], lr=1e-2)

    assert_healthy(judged(Task(peft_llama(), step, optimizers), token_batches(24)))


def test_averaged_weights_are_swapped_in_for_validation():
    probe = LoraProbe(every_n_steps=1, verbose=False)
    settings = {"callbacks": [probe, EMAWeightAveraging(decay=0.9)], "val_check_interval": 3, "max_epochs": 2}
    pl.Trainer(**(QUIET | settings)).fit(Validated(peft_llama()), token_batches(12), token_batches(2))
    assert_healthy(probe.report)


def test_stochastic_weight_averaging():
    probe = LoraProbe(every_n_steps=1, verbose=False)
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)
    trainer = pl.Trainer(**(QUIET | {"callbacks": [probe, averaging], "max_epochs": 4}))
    trainer.fit(Task(peft_llama()), token_batches(6))
    assert_healthy(probe.report)


def test_sharpness_aware_minimization():
    """The weights are moved, a second gradient is taken there, and they are put back before the step."""

    def step(task: Task, ids: torch.Tensor, index: int) -> None:
        optimizer, tensors = task.optimizers(), trainable(task)
        optimizer.zero_grad()
        task.manual_backward(language_loss(task, ids, index))
        before = [p.detach().clone() for p in tensors]
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in tensors]).norm()
            for p in tensors:
                p.add_(0.05 * p.grad / norm)
        optimizer.zero_grad()
        task.manual_backward(language_loss(task, ids, index))
        with torch.no_grad():
            for p, value in zip(tensors, before, strict=True):
                p.copy_(value)
        optimizer.step()

    assert_healthy(judged(Task(peft_llama(), step, automatic=False)))


def test_gradients_that_are_cached():
    """GradCache: outputs without gradients first, then their gradient is given to a second forward."""

    def step(task: Task, ids: torch.Tensor, index: int) -> None:
        optimizer = task.optimizers()
        optimizer.zero_grad()
        with torch.no_grad():
            outputs = torch.cat([task.model(input_ids=part).logits[:, -1] for part in ids.split(1)])
        outputs.requires_grad_()
        (outputs @ outputs.T).log_softmax(-1).diagonal().mean().neg().backward()
        for part, gradient in zip(ids.split(1), outputs.grad.split(1), strict=True):
            task.manual_backward((task.model(input_ids=part).logits[:, -1] * gradient).sum())
        optimizer.step()

    assert_healthy(judged(Task(peft_llama(), step, automatic=False)))


def test_gradients_by_autograd_grad():
    def step(task: Task, ids: torch.Tensor, index: int) -> None:
        optimizer, tensors = task.optimizers(), trainable(task)
        for p, gradient in zip(tensors, torch.autograd.grad(language_loss(task, ids, index), tensors), strict=True):
            p.grad = gradient
        optimizer.step()

    assert_healthy(judged(Task(peft_llama(), step, automatic=False)))


def test_meta_learning_by_functional_call():
    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        slow = {n: p for n, p in task.model.named_parameters() if p.requires_grad}
        words = {"input_ids": ids, "labels": ids}
        inner = functional_call(task.model, slow, (), words).loss
        gradients = torch.autograd.grad(inner, list(slow.values()), create_graph=True)
        fast = {n: p - 0.1 * g for (n, p), g in zip(slow.items(), gradients, strict=True)}
        return functional_call(task.model, fast, (), words).loss

    # Second derivatives: the fused attention of torch 2.13 has none.
    assert_healthy(judged(Task(peft_llama(llama(attn_implementation="eager")), step)))


def test_contrastive_loss_of_three_forwards():
    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        one, two, three = (task.model(input_ids=x).logits[:, -1] for x in (ids, ids.flip(0), ids.flip(1)))
        return nn.functional.triplet_margin_loss(one, two, three) + (one - two).square().mean()

    assert_healthy(judged(Task(peft_llama(), step)))


def test_forward_in_grad_mode_for_a_metric():
    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        task.metric = language_loss(task, ids, index).item()
        return language_loss(task, ids, index)

    assert_healthy(judged(Task(peft_llama(), step)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_whole_model_under_one_checkpoint(reentrant):
    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        words = task.model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = checkpoint(lambda x: task.model(inputs_embeds=x).logits, words, use_reentrant=reentrant)
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())

    # In a reentrant one all layers run under no_grad, then inside the backward: no forward is a training forward.
    hidden = "LP101 LP102 LP103 LP104 LP105 LP106 LP301 LP302" if reentrant else ""
    assert_healthy(judged(Task(peft_llama(), step)), but=hidden)


@pytest.mark.parametrize(
    "settings",
    [{"fused": True}, {"lr": torch.tensor(1e-2), "foreach": False}, {"amsgrad": True}, {"maximize": True}],
    ids=str,
)
def test_ways_of_adam(settings):
    assert_healthy(judged(Task(peft_llama(), optimizers=lambda task: adamw(task, **settings))))


def test_gradients_are_zeroed_in_place():
    class InPlace(Task):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
            optimizer.zero_grad(set_to_none=False)

    assert_healthy(judged(InPlace(peft_llama())))


@pytest.fixture
def default_device() -> Iterator[None]:
    torch.set_default_device("cpu")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("default_device")
def test_default_device_is_set():
    assert_healthy(judged(Task(peft_llama())))


def test_trainer_without_anything():
    probe = LoraProbe(every_n_steps=1, verbose=False)
    trainer = pl.Trainer(accelerator="cpu", devices=1, barebones=True, max_epochs=1, callbacks=[probe])
    trainer.fit(Task(peft_llama()), token_batches(8))
    assert_healthy(probe.report)


def test_validation_before_training():
    probe, task = LoraProbe(every_n_steps=1, verbose=False), Validated(peft_llama())
    trainer = pl.Trainer(**(QUIET | {"callbacks": [probe]}))
    trainer.validate(task, token_batches(2), verbose=False)
    assert probe.report.healthy is None
    trainer.fit(task, token_batches(8), token_batches(1))
    assert_healthy(probe.report)
