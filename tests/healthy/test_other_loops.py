"""Loops that look like no other, and train: judged, and found healthy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.tuner import Tuner
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from support.recipes import TwoTowers
from support.training import (
    Loop,
    Training,
    Watched,
    adamw,
    adapter_tensors,
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
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbe, LoraProbeError, LoraProbeMonitor

ORDINARY = ("LP101", "LP201", "LP202", "LP203", "LP302", "LP303", "LP401")


def plain(
    model: nn.Module, optimizers: Any, body: Callable[[Tensor, int], object], steps: int = 8, **intent: Any
) -> Watched:
    """A loop of one's own, watched at every step."""
    probe = LoraProbeMonitor(model, optimizers, verbose=False, every_n_steps=1, **intent)
    error: BaseException | None = None
    try:
        with probe:
            for number, batch in enumerate(batches(steps)):
                body(batch, number)
    except LoraProbeError as raised:
        error = raised
    assert not probe.report.internal_errors, "\n".join(probe.report.internal_errors)
    return Watched(probe.report, error)


def judged(watched: Watched, *but: str) -> None:
    """Healthy, and said so by what judges every run."""
    assert_healthy(watched)
    verdicts = {f.code: f.status for f in watched.report.findings}
    assert {c: verdicts[c] for c in ORDINARY if c not in but} == dict.fromkeys(set(ORDINARY) - {*but}, "pass")


# --- where the gradients come from ----------------------------------------------------------------


def test_optimizer_inside_the_backward() -> None:
    """One optimizer a tensor, stepped as its gradient is complete and cleared at once (LOMO, torchtune)."""
    model = lora()
    optimizers = {p: AdamW([p], lr=1e-3) for p in trainable(model)}

    def step(tensor: Tensor) -> None:
        optimizers[tensor].step()
        optimizers[tensor].zero_grad()

    for tensor in optimizers:
        tensor.register_post_accumulate_grad_hook(step)
    judged(plain(model, list(optimizers.values()), lambda b, n: next_token_loss(model, b, n).backward()))


def test_gradients_by_autograd_grad() -> None:
    model = lora()
    optimizer, tensors = adamw(model), trainable(model)

    def body(batch: Tensor, number: int) -> None:
        found = torch.autograd.grad(next_token_loss(model, batch, number), tensors)
        for tensor, gradient in zip(tensors, found, strict=True):
            tensor.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    judged(plain(model, optimizer, body))


def called(model: nn.Module, tensors: dict[str, Tensor], batch: Tensor) -> Tensor:
    return torch.func.functional_call(model, tensors, (), {"input_ids": batch, "labels": batch}).loss


def own(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_by_functional_transforms() -> None:
    model = lora()
    optimizer = adamw(model)

    def body(batch: Tensor, number: int) -> None:
        values = {name: p.detach() for name, p in own(model).items()}
        for name, gradient in torch.func.grad(lambda tensors: called(model, tensors, batch))(values).items():
            own(model)[name].grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    assert_healthy(plain(model, optimizer, body))


@pytest.mark.parametrize("inner", [0, 1])
def test_fast_weights(inner: int) -> None:
    """MAML: the model is called with other tensors in the place of its own, and its own get the gradient."""
    model = lora()
    optimizer = adamw(model)

    def body(batch: Tensor, number: int) -> None:
        fast = {name: p * 1.0 for name, p in own(model).items()}
        for _ in range(inner):
            gradients = torch.autograd.grad(called(model, fast, batch), list(fast.values()))
            fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), gradients, strict=True)}
        called(model, fast, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    judged(plain(model, optimizer, body))


def test_gradients_example_by_example_with_noise() -> None:
    """DP-SGD by hand: what arrives is taken away, added up elsewhere, and put back."""
    model = lora()
    optimizer, tensors = adamw(model), trainable(model)
    generator = torch.Generator().manual_seed(0)

    def body(batch: Tensor, number: int) -> None:
        total = [torch.zeros_like(p) for p in tensors]
        for row in batch.split(1):
            next_token_loss(model, row, number).backward()
            for part, tensor in zip(total, tensors, strict=True):
                part += tensor.grad
            optimizer.zero_grad()
        for part, tensor in zip(total, tensors, strict=True):
            tensor.grad = part + 1e-4 * torch.randn(part.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()

    judged(plain(model, optimizer, body))


def test_gradients_that_hooks_center() -> None:
    model = lora()
    for tensor in trainable(model):
        tensor.register_hook(lambda gradient: gradient - gradient.mean())
    judged(watch(Training(model), every_n_steps=1))


# --- what happens to the values -------------------------------------------------------------------


def test_values_perturbed_for_a_second_backward() -> None:
    """SAM: up the gradient, forward and backward once more, back again, and a step with the second gradient."""
    model = lora()
    trained(model, std=0.01)
    optimizer, tensors = SGD(trainable(model), lr=0.05), trainable(model)

    def body(batch: Tensor, number: int) -> None:
        next_token_loss(model, batch, number).backward()
        ascent = [p.grad * 0.05 for p in tensors]
        with torch.no_grad():
            torch._foreach_add_(tensors, ascent)
        optimizer.zero_grad()
        next_token_loss(model, batch, number).backward()
        with torch.no_grad():
            torch._foreach_sub_(tensors, ascent)
        optimizer.step()
        optimizer.zero_grad()

    judged(plain(model, optimizer, body))


def test_a_and_b_in_turns() -> None:
    model = lora()
    trained(model, std=0.01)

    def turn(run: Training, step: int) -> None:
        for name, tensor in adapter_tensors(model).items():
            tensor.requires_grad_(("lora_B" in name) == (step % 2 == 0))

    assert_healthy(watch(Training(model, optimizer=adamw(model), between_steps=turn), every_n_steps=1))


def restarted(model: nn.Module) -> None:
    """Merge the adapter into the base for good and begin a new one (ReLoRA)."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.base_layer.weight += layer.get_delta_weight("default")
                layer.reset_lora_parameters("default", True)


@pytest.mark.parametrize("every_n_steps", [1, 4])
def test_restarts_that_merge_the_adapter_into_the_base(every_n_steps: int) -> None:
    model = lora()
    optimizer = adamw(model, lr=1e-2)

    def restart(run: Training, step: int) -> None:
        if step and step % 3 == 0:
            restarted(model)
            optimizer.state.clear()

    watched = watch(Training(model, optimizer=optimizer, between_steps=restart), 14, every_n_steps=every_n_steps)
    judged(watched)
    assert watched.report.findings[-1].status != "fail"


def test_base_that_moves_beside_an_adapter_that_stays_is_a_fault() -> None:
    """The same change of the base without the restart."""
    model = lora()

    def merge(run: Training, step: int) -> None:
        if step == 3:
            with torch.no_grad():
                for layer in model.modules():
                    if isinstance(layer, LoraLayer):
                        layer.base_layer.weight += layer.get_delta_weight("default")

    watched = watch(Training(model, optimizer=adamw(model, lr=1e-2), between_steps=merge), every_n_steps=1)
    assert_found(watched, "LP404", 3, "has drifted")


def slow(model: nn.Module, every: int, weight: float) -> Callable[[Training, int], None]:
    values = [p.detach().clone() for p in trainable(model)]

    def between(run: Training, step: int) -> None:
        if step and step % every == 0:
            with torch.no_grad():
                for fast, value in zip(trainable(model), values, strict=True):
                    value.lerp_(fast, weight)
                    fast.copy_(value)

    return between


@pytest.mark.parametrize(("every", "weight"), [(3, 0.5), (1, 0.9), (2, 0.5)])
def test_slow_weights_that_follow(every: int, weight: float) -> None:
    """Lookahead and Reptile write to the adapter between steps."""
    model = lora()
    run = Training(model, optimizer=SGD(trainable(model), lr=0.1), between_steps=slow(model, every, weight))
    judged(watch(run, 10, every_n_steps=1))


def test_average_that_stands_in_for_an_evaluation() -> None:
    """The storage is exchanged, and exchanged back."""
    model = lora()
    average = [p.detach().clone() for p in trainable(model)]

    def evaluate(run: Training, step: int) -> None:
        tensors = trainable(model)
        for value, tensor in zip(average, tensors, strict=True):
            value.lerp_(tensor.detach(), 0.1)
        kept = [p.data for p in tensors]
        for tensor, value in zip(tensors, average, strict=True):
            tensor.data = value
        with torch.no_grad():
            next_token_loss(model, batches(1)[0], 0)
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.data = value

    judged(watch(Training(model, between_steps=evaluate), every_n_steps=1))


class Stochastic(Optimizer):
    """Signs of the gradients, rounded to bfloat16 at random."""

    def __init__(self, tensors: Any, lr: float) -> None:
        super().__init__(tensors, {"lr": lr})
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for tensor in (t for t in group["params"] if t.grad is not None):
                bits = (tensor.float() - group["lr"] * tensor.grad.float().sign()).view(torch.int32)
                bits += torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=self.generator)
                tensor.copy_((bits & -65536).view(torch.float32))
        return loss


def test_stochastic_rounding_of_a_16_bit_adapter() -> None:
    model = get_peft_model(llama(torch.bfloat16), config(), autocast_adapter_dtype=False)
    judged(watch(Training(model, optimizer=Stochastic(trainable(model), lr=1e-2)), every_n_steps=1))


# --- what else is trained -------------------------------------------------------------------------


def test_discriminator_that_freezes_the_adapter_for_its_turn() -> None:
    model, critic = lora(), nn.Linear(32, 1)
    first, second = adamw(model), AdamW(critic.parameters(), lr=1e-3)
    tensors = adapter_tensors(model).values()

    def body(batch: Tensor, number: int) -> None:
        for tensor in tensors:
            tensor.requires_grad_(False)
        critic(model.get_base_model().model(input_ids=batch)[0].detach()).mean().backward()
        second.step()
        second.zero_grad()
        for tensor in tensors:
            tensor.requires_grad_(True)
        (-critic(model.get_base_model().model(input_ids=batch)[0]).mean()).backward()
        first.step()
        first.zero_grad()
        second.zero_grad()

    judged(plain(model, [first, second], body), "LP203")  # at its end the adapter waits for its next turn


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_the_base_that_train_along(bias: str) -> None:
    judged(watch(Training(lora(base=llama(attention_bias=True), bias=bias)), every_n_steps=1))


# --- Lightning ------------------------------------------------------------------------------------


class Tuned(Loop):
    lr = 1e-4

    def configure_optimizers(self) -> Any:
        return AdamW(trainable(self.model), lr=self.lr)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", next_token_loss(self.model, batch, batch_idx))


def lightning(folder: str, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": folder}
    return pl.Trainer(callbacks=list(callbacks), max_steps=8, **quiet, **options)


def loader(number: int) -> DataLoader:
    return DataLoader(batches(number), batch_size=None)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_learning_rate_finder_before_the_run() -> None:
    """It runs the model for some steps at rates that rise, and puts everything back."""
    probe, module = LoraProbe(verbose=False, every_n_steps=1), Tuned(Training(lora()))
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning(folder, probe)
        Tuner(trainer).lr_find(module, loader(30), num_training=12)
        assert_healthy(Watched(probe.report, None))
        trainer.fit(module, loader(30))
    judged(Watched(probe.report, None))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_averaged_weights_that_validate() -> None:
    probe, module = LoraProbe(verbose=False, every_n_steps=1), Tuned(Training(lora()))
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning(folder, probe, EMAWeightAveraging(decay=0.9), val_check_interval=2)
        trainer.fit(module, loader(8), loader(2))
    judged(Watched(probe.report, None))


# --- the graph that was captured before -----------------------------------------------------------


@pytest.mark.parametrize("guards", [True, False])
def test_compiled_model_whose_adapter_is_switched(guards: bool) -> None:
    """With its guards dynamo captures the graph anew; without, the former adapter goes on to act and nothing learns."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules=["vision.0", "language"])
    model = get_peft_model(TwoTowers(), settings)
    model.add_adapter("b", settings)
    without = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    captured = torch.compile(model, backend="eager", options=None if guards else without)
    captured(torch.randn(2, 12, requires_grad=True))
    model.set_adapter("b")
    optimizer = AdamW(list(adapter_tensors(model, "b").values()), lr=1e-3)

    def body(batch: Tensor, number: int) -> None:
        captured((batch.float() / 64).requires_grad_()).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    watched = plain(captured, optimizer, body, steps=5, reference_adapters=("default",))
    if guards:
        assert_healthy(watched)
    else:
        assert_found(watched, "LP301", 0, "the loss does not depend on any of the 4 adapter tensors")
