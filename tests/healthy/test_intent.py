"""What is meant is recognised: warm-ups, turns, thaws, pruning, takeovers are healthy, their faulty twins are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from support.tiny import QUIET, token_batches
from support.training import (
    adapter_tensors,
    batches,
    config,
    left_by_the_probe,
    llama,
    lora,
    next_token_loss,
    trainable,
)
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lora_probe_callbacks import LoraProbe, LoraProbeMonitor, ProbeReport, faults

Body = Callable[[Tensor, int], object]


def watched(
    model: nn.Module, optimizers: Any, body: Body, steps: int = 20, every: int = 1, **intent: Any
) -> ProbeReport:
    """A plain loop with a probe that never stops it."""
    with LoraProbeMonitor(model, optimizers, verbose=False, every_n_steps=every, on_failure="stop", **intent) as probe:
        for number, batch in enumerate(batches(steps)):
            body(batch, number)
    assert not left_by_the_probe(model)
    assert not probe.report.internal_errors, "\n".join(probe.report.internal_errors)
    return probe.report


def found(report: ProbeReport) -> list[tuple[str, str]]:
    return [(f.code, f.status) for f in report.with_status("fail", "warn")]


def assert_proven(report: ProbeReport) -> None:
    assert not found(report), list(map(str, report.with_status("fail", "warn")))
    assert report.status == "healthy", report.why_unproven()


def stepping(model: nn.Module, optimizer: Optimizer) -> Body:
    def body(batch: Tensor, number: int) -> None:
        next_token_loss(model, batch, number).backward()
        optimizer.step()
        optimizer.zero_grad()

    return body


# --- optimizers that gather before they step ------------------------------------------------------


class Rectified(Optimizer):
    """Adam that leaves out its first steps, as RAdam without the steps of SGD does."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), *, never: bool = False
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.betas, self.never = betas, never

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for tensor in (t for group in self.param_groups for t in group["params"] if t.grad is not None):
            if self.never:
                continue
            state = self.state[tensor]
            if not state:
                state |= {"step": 0, "m": torch.zeros_like(tensor), "v": torch.zeros_like(tensor)}
            state["step"] += 1
            one, two = self.betas
            state["m"].lerp_(tensor.grad, 1 - one)
            state["v"].lerp_(tensor.grad.square(), 1 - two)
            power, limit = two ** state["step"], 2 / (1 - two) - 1
            length = limit - 2 * state["step"] * power / (1 - power)
            if length > 5:
                rate = math.sqrt((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length))
                size = state["m"] / (1 - one ** state["step"]) / (state["v"] / (1 - power)).sqrt().add(1e-8)
                tensor.sub_(size, alpha=rate * self.param_groups[0]["lr"])


@pytest.mark.parametrize("every", [1, 50])
def test_optimizer_that_moves_nothing_in_its_first_steps(every: int) -> None:
    model = lora()
    assert_proven(watched(model, (o := Rectified(trainable(model), lr=1e-2)), stepping(model, o), every=every))


def test_twin_that_never_moves_anything() -> None:
    model = lora()
    report = watched(model, (o := Rectified(trainable(model), lr=1e-2, never=True)), stepping(model, o), steps=6)
    assert [(f.code, f.status, f.step) for f in report.failures] == [("LP401", "fail", 3)]


# --- a factor that is warmed up -----------------------------------------------------------------------


def scale(model: nn.Module, factor: float) -> None:
    for module in model.modules():
        if "default" in getattr(module, "lora_A", {}):
            module.scaling["default"] = 2.0 * factor


@pytest.mark.parametrize("over", [5, 12])
def test_factor_warmed_up_from_zero(over: int) -> None:
    model = lora()
    optimizer = AdamW(trainable(model), lr=1e-2)
    step = stepping(model, optimizer)
    assert_proven(watched(model, optimizer, lambda b, n: (scale(model, min(1.0, n / over)), step(b, n)), steps=24))


def test_twin_whose_factor_stays_at_zero() -> None:
    model = lora()
    optimizer = AdamW(trainable(model), lr=1e-2)
    scale(model, 0.0)
    report = watched(model, optimizer, stepping(model, optimizer), steps=8)
    assert [(f.code, f.status, f.step) for f in report.failures] == [("LP502", "fail", 3)]


def test_twin_whose_warm_up_ends_too_low() -> None:
    model = lora()
    optimizer = AdamW(trainable(model), lr=1e-2)
    step = stepping(model, optimizer)
    report = watched(model, optimizer, lambda b, n: (scale(model, min(0.5, n / 10)), step(b, n)), steps=20)
    assert found(report) == [("LP502", "warn")]


# --- parts that take turns ------------------------------------------------------------------------------


def train_layers(model: PeftModel, chosen: set[int]) -> None:
    for number, layer in enumerate(model.get_base_model().model.layers):
        for name, tensor in layer.named_parameters():
            if "lora_" in name:
                tensor.requires_grad_(number in chosen)


@pytest.mark.parametrize("interval", [1, 3, 7])
@pytest.mark.parametrize("every", [1, 50])
def test_layers_in_turns_with_one_optimizer(interval: int, every: int) -> None:
    """LISA, BAdam."""
    model = lora(base=llama(layers=4), hook=True)
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    step = stepping(model, optimizer)

    def body(batch: Tensor, number: int) -> None:
        train_layers(model, {(number // interval) % 4})
        step(batch, number)

    assert_proven(watched(model, optimizer, body, steps=8 * interval + 8, every=every))


def test_twin_whose_turn_never_comes() -> None:
    model = lora(base=llama(layers=4), hook=True)
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    step = stepping(model, optimizer)
    report = watched(model, optimizer, lambda b, n: (train_layers(model, {n % 3}), step(b, n)), steps=24)
    assert report.status == "unproven"
    assert all("layers.3" in name for name in report.proofs["moved"].missing)
    assert len(report.proofs["moved"].missing) == 4


def test_a_and_b_in_turns() -> None:
    model = lora(hook=True)
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    step = stepping(model, optimizer)

    def body(batch: Tensor, number: int) -> None:
        for name, tensor in adapter_tensors(model).items():
            tensor.requires_grad_(("lora_B" in name) == (number // 4 % 2 == 0))
        step(batch, number)

    assert_proven(watched(model, optimizer, body, steps=24))


# --- frozen later: a regression, unless it is a turn ---------------------------------------------------


def freeze(tensors: dict[str, nn.Parameter], part: str) -> None:
    for name, tensor in tensors.items():
        if part in name:
            tensor.requires_grad_(False)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "layers.1", "q_proj.lora_A"])
@pytest.mark.parametrize("drop", [False, True])
def test_what_has_trained_and_is_frozen_later_is_named_with_its_step(part: str, drop: bool) -> None:
    model = lora(hook=True)
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    step = stepping(model, optimizer)

    def body(batch: Tensor, number: int) -> None:
        if number == 5:
            freeze(adapter_tensors(model), part)
            if drop:
                group = optimizer.param_groups[0]
                group["params"] = [t for t in group["params"] if t.requires_grad]
        step(batch, number)

    report = watched(model, optimizer, body, steps=10)
    finding = next(f for f in report.with_status("fail", "warn"))
    assert found(report) == [("LP203", "warn")]
    assert "frozen since step 5" in finding.message
    assert finding.step == 5
    assert report.status == "unproven"
    assert all(part in name for name in report.proofs["moved"].missing)


def test_a_frozen_from_the_start_is_lora_fa() -> None:
    model = lora(hook=True)
    freeze(adapter_tensors(model), "lora_A")
    optimizer = AdamW(trainable(model), lr=1e-2)
    assert_proven(watched(model, optimizer, stepping(model, optimizer)))


# --- an adapter that is thawed later ------------------------------------------------------------------


class Headed(pl.LightningModule):
    """An adapted backbone, and a head that trains from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = lora(hook=True)
        self.head = nn.Linear(64, 64)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.head(self.backbone(input_ids=batch).logits)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Optimizer:
        return AdamW(trainable(self), lr=1e-2)


class AdapterFinetuning(BaseFinetuning):
    """Thaws the adapter alone."""

    def __init__(self, at_epoch: int) -> None:
        super().__init__()
        self.at_epoch = at_epoch

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch == self.at_epoch:
            tensors = list(adapter_tensors(pl_module.backbone).values())
            for tensor in tensors:
                tensor.requires_grad_(True)
            optimizer.add_param_group({"params": tensors, "lr": 1e-2})


def fit_headed(callback: BaseFinetuning | None, every: int, module: Headed | None = None) -> ProbeReport:
    torch.manual_seed(0)
    probe = LoraProbe(verbose=False, every_n_steps=every, on_failure="warn")
    callbacks = [probe] if callback is None else [callback, probe]
    trainer = pl.Trainer(**QUIET | {"max_epochs": 3, "callbacks": callbacks})
    trainer.fit(module or Headed(), token_batches(10))
    assert not probe.report.internal_errors, probe.report.internal_errors
    return probe.report


@pytest.mark.parametrize("every", [1, 50])
def test_adapter_thawed_by_a_finetuning_callback(every: int) -> None:
    assert_proven(fit_headed(AdapterFinetuning(1), every))


@pytest.mark.filterwarnings("ignore::lora_probe_callbacks.report.findings.LoraProbeWarning")
def test_twin_that_is_never_thawed() -> None:
    report = fit_headed(AdapterFinetuning(99), 1)
    assert found(report) == [("LP203", "fail")]


@pytest.mark.parametrize("every", [1, 50])
def test_adapter_that_the_optimizer_owns_is_thawed_by_the_loop(every: int) -> None:
    model = lora(hook=True)
    head = nn.Linear(64, 64)
    optimizer = AdamW([*trainable(model), *head.parameters()], lr=1e-2)
    both = nn.ModuleList([model, head])

    def body(batch: Tensor, number: int) -> None:
        for tensor in adapter_tensors(model).values():
            tensor.requires_grad_(number >= 12)
        logits = head(model(input_ids=batch).logits)
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert_proven(watched(both, optimizer, body, steps=32, every=every))


# --- tenants --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [1, 6])
@pytest.mark.parametrize("late_step", [False, True])
def test_two_adapters_in_turns_with_an_optimizer_each(phase: int, late_step: bool) -> None:
    model = lora(hook=True)
    model.add_adapter("b", config())
    own: dict[str, Optimizer] = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        own[name] = AdamW(adapter_tensors(model, f"{name}.").values() or adapter_tensors(model, name).values(), lr=1e-2)
    model.set_adapter("default")

    def body(batch: Tensor, number: int) -> None:
        name, other = ("default", "b") if number // phase % 2 == 0 else ("b", "default")
        model.set_adapter(name)
        next_token_loss(model, batch, number).backward()
        if late_step:
            model.set_adapter(other)
        own[name].step()
        own[name].zero_grad()

    assert_proven(watched(model, list(own.values()), body, steps=36))


# --- AdaLoRA ----------------------------------------------------------------------------------------------


def test_module_that_lost_its_budget() -> None:
    torch.manual_seed(1)
    steps = 40
    settings = {"init_r": 4, "target_r": 1, "tinit": 2, "tfinal": 4, "deltaT": 1, "total_step": steps}
    adalora = AdaLoraConfig(task_type="CAUSAL_LM", lora_alpha=8, target_modules=["q_proj", "v_proj"], **settings)
    model = get_peft_model(llama(), adalora)
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    gates = {n: t for n, t in model.named_parameters() if "lora_E" in n}

    def body(batch: Tensor, number: int) -> None:
        next_token_loss(model, batch, number).backward()
        optimizer.step()
        model.base_model.update_and_allocate(number)
        if number >= 4:  # what the allocator does to a module that is not worth its rank
            next(iter(gates.values())).data.zero_()
        optimizer.zero_grad()

    assert_proven(watched(model, optimizer, body, steps=steps))


def test_twin_whose_gates_are_all_put_to_zero() -> None:
    torch.manual_seed(1)
    settings = {"init_r": 4, "target_r": 2, "tinit": 30, "tfinal": 4, "deltaT": 1, "total_step": 60}
    adalora = AdaLoraConfig(task_type="CAUSAL_LM", lora_alpha=8, target_modules=["q_proj", "v_proj"], **settings)
    model = get_peft_model(llama(), adalora)
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    step = stepping(model, optimizer)

    def body(batch: Tensor, number: int) -> None:
        step(batch, number)
        for name, tensor in model.named_parameters():
            if "lora_E" in name and number >= 3:
                tensor.data.zero_()

    assert ("LP401", "warn") in found(watched(model, optimizer, body, steps=20))


# --- a reference that was scored beforehand -------------------------------------------------------------


@pytest.mark.parametrize("copied", [True, False])
def test_frozen_copy_that_was_used_before_training(copied: bool) -> None:
    model = lora(hook=True)
    model.add_adapter("ref", config())
    if copied:
        values = adapter_tensors(model)
        with torch.no_grad():
            for name, tensor in values.items():
                if ".ref." in name:
                    tensor.copy_(values[name.replace(".ref.", ".default.")])
    optimizer = AdamW(trainable(model), lr=1e-2)
    report = watched(model, optimizer, stepping(model, optimizer), steps=8)
    assert found(report) == ([] if copied else [("LP108", "warn")])


# --- an optimizer that takes over -------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 50])
@pytest.mark.parametrize("at", [2, 10])
def test_optimizer_that_takes_over_from_another(at: int, every: int) -> None:
    """Adam first and SGD after it, over the same tensors."""
    model = lora(hook=True)
    first, second = AdamW(trainable(model), lr=1e-2), SGD(trainable(model), lr=1e-1)

    def body(batch: Tensor, number: int) -> None:
        next_token_loss(model, batch, number).backward()
        (first if number < at else second).step()
        model.zero_grad()

    assert_proven(watched(model, [first, second], body, steps=60, every=every))


def test_twin_that_nobody_takes_over_from() -> None:
    model = lora(hook=True)
    first, second = AdamW(trainable(model), lr=1e-2), SGD(trainable(model), lr=1e-1)

    def body(batch: Tensor, number: int) -> None:
        next_token_loss(model, batch, number).backward()
        if number < 5:
            first.step()
        model.zero_grad()

    assert watched(model, [first, second], body, steps=60, every=50).status == "unhealthy"


# --- rows and modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_rows_without_invocation_tokens_are_told(rows: int) -> None:
    tokens = [7, 9]
    alora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=tokens)
    model = get_peft_model(llama(), alora)
    model.enable_input_require_grads()
    optimizer = AdamW(trainable(model), lr=1e-2)

    def body(batch: Tensor, number: int) -> None:
        ids = faults.invocation_tokens_changed(torch.cat([batch, batch.flip(0)]), tokens, 8)
        ids[:rows, 4:6] = torch.tensor(tokens)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    report = watched(model, optimizer, body, steps=8)
    if rows == 4:
        assert_proven(report)
        return
    assert found(report) == [("LP110", "warn" if rows else "fail")]
    assert f"missing in {4 - rows} of 4 rows" in next(f.message for f in report.findings if f.code == "LP110")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["default", "b", "default", "b"], "'default' in 2 of 4 rows, 'b' in 2 of 4 rows"),
        (["__base__", "b", "default", "__base__"], "'default' in 1 of 4 rows, 'b' in 1 of 4 rows"),
    ],
)
def test_rows_for_several_adapters(names: list[str], said: str) -> None:
    model = lora()
    model.add_adapter("b", config())
    for tensor in adapter_tensors(model).values():
        tensor.requires_grad_(True)
    model.eval()
    optimizer = AdamW(adapter_tensors(model).values(), lr=1e-2, weight_decay=0.0)

    def body(batch: Tensor, number: int) -> None:
        ids = torch.cat([batch, batch.flip(0)])
        model(input_ids=ids, labels=ids, adapter_names=names).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    report = watched(model, optimizer, body, steps=8, adapter=("default", "b"))
    assert_proven(report)
    assert report.proofs["active"].detail == said


@pytest.mark.parametrize("mode", ["train", "eval", "eval after step 3"])
def test_dropout_that_is_configured_and_off(mode: str) -> None:
    model = lora(lora_dropout=0.5, hook=True)
    model.train()
    optimizer = AdamW(trainable(model), lr=1e-2)
    step = stepping(model, optimizer)
    if mode == "eval":
        faults.left_in_eval_mode(model)

    def body(batch: Tensor, number: int) -> None:
        if mode == "eval after step 3" and number == 4:
            faults.left_in_eval_mode(model)
        step(batch, number)

    report = watched(model, optimizer, body, steps=10)
    assert [(f.code, f.status, f.step) for f in report.with_status("fail", "warn")] == {
        "train": [],
        "eval": [("LP111", "warn", 0)],
        "eval after step 3": [("LP111", "warn", 4)],
    }[mode]


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_that_is_on_and_does_nothing(training: bool) -> None:
    base = llama()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = lora(base=base, hook=True)
    optimizer = AdamW(trainable(model), lr=1e-2)
    base.train(training)
    report = watched(model, optimizer, stepping(model, optimizer), steps=8)
    assert found(report) == ([] if training else [("LP111", "warn")])


# --- no backward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [0, 6])
def test_forgotten_backward_is_called_so(begins: int) -> None:
    model = lora(hook=True)
    optimizer = AdamW(trainable(model), lr=1e-2)

    def body(batch: Tensor, number: int) -> None:
        loss = next_token_loss(model, batch, number)
        if number < begins:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    report = watched(model, optimizer, body, steps=begins + 5)
    (finding,) = report.failures
    assert (finding.code, finding.step) == ("LP301", begins)
    assert "no backward was called" in finding.message
    assert "detach" not in finding.fix


def test_detached_loss_is_still_called_so() -> None:
    model = lora(hook=True)
    optimizer = AdamW(trainable(model), lr=1e-2)

    def body(batch: Tensor, number: int) -> None:
        next_token_loss(model, batch, number).detach().requires_grad_(True).backward()
        optimizer.step()
        optimizer.zero_grad()

    (finding,) = watched(model, optimizer, body, steps=5).failures
    assert (finding.code, finding.step) == ("LP301", 0)
    assert "no backward" not in finding.message
    assert "detach" in finding.fix
