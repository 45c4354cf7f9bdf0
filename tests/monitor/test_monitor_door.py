"""The context manager around loops of every kind: Accelerate, scalers, closures, several models."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker, on_main_process
from peft import PeftModel
from support.doors import fit_plain
from support.recipes import from_step
from support.training import (
    VOCABULARY,
    Training,
    adamw,
    batches,
    config,
    hooks_of_the_probe,
    llama,
    lora,
    next_token_loss,
    trainable,
)
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from lora_probe_callbacks import LoraProbeError, LoraProbeMonitor, LoraProbeWarning, ProbeReport, faults


def monitor(model: Any, optimizer: Any, **options: Any) -> LoraProbeMonitor:
    return LoraProbeMonitor(model, optimizer, **{"every_n_steps": 1, "verbose": False, **options})


def assert_healthy(report: ProbeReport, steps: int, *judged: str) -> None:
    assert report.healthy is True, str(report)
    assert not report.with_status("warn"), str(report)
    assert not report.internal_errors, report.internal_errors
    assert report.judged_steps == steps
    passed = {f.code for f in report.with_status("pass") if f.last_step >= steps - 1}
    assert {"LP101", "LP103", "LP104", "LP201", "LP302", "LP401", "LP404", *judged} <= passed, str(report)


def assert_no_trace(model: nn.Module, optimizer: Optimizer) -> None:
    assert not list(hooks_of_the_probe(model))
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def loop(model: nn.Module, optimizer: Optimizer, steps: int = 6) -> None:
    for number, batch in enumerate(batches(steps)):
        next_token_loss(model, batch, number).backward()
        optimizer.step()
        optimizer.zero_grad()


# --- the plain loop ------------------------------------------------------------------------------


def test_loop_does_not_change_by_a_line() -> None:
    model = lora(lora_dropout=0.1)
    optimizer = adamw(model)
    rows: dict[int, dict[str, float]] = {}
    with monitor(model, optimizer, log=lambda row, step: rows.setdefault(step, {}).update(row)) as probe:
        loop(model, optimizer)
    assert_healthy(probe.report, 6)
    assert list(rows) == list(range(6))
    assert all(row["lora_probe/update/moved_fraction_B"] > 0.9 for row in rows.values())
    assert_no_trace(model, optimizer)


def test_model_with_an_adapter_of_transformers_own() -> None:
    model = llama()
    model.add_adapter(config())
    optimizer = adamw(model)
    with monitor(model, optimizer) as probe:
        loop(model, optimizer)
    assert_healthy(probe.report, 6)
    model.disable_adapters()
    model.enable_input_require_grads()
    with pytest.raises(LoraProbeError, match="LP102"), monitor(model, optimizer):
        loop(model, optimizer)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model(backend: str) -> None:
    torch._dynamo.reset()
    model = lora(base=llama(layers=1))
    optimizer = adamw(model)
    compiled = torch.compile(model, backend=backend)
    with monitor(compiled, optimizer) as probe:
        loop(compiled, optimizer, 5)
        assert not list(hooks_of_the_probe(model)), "hooks inside the region would stay in its graph"
    assert probe.report.healthy is True
    assert not probe.report.with_status("warn"), str(probe.report)
    assert {"LP101", "LP201", "LP302", "LP401"} <= {f.code for f in probe.report.with_status("pass")}
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["sgd", "lbfgs"])
@pytest.mark.parametrize("merged", [False, True])
def test_step_with_a_closure(kind: str, merged: bool) -> None:
    """Forward and backward run inside step(); LBFGS runs them several times for one step."""
    model = lora(hook=True)
    if merged:
        faults.left_merged(model)
    optimizer: Optimizer = SGD(trainable(model), lr=0.1) if kind == "sgd" else LBFGS(trainable(model), max_iter=3)

    def steps() -> None:
        for number, batch in enumerate(batches(5)):

            def closure(number: int = number, batch: Tensor = batch) -> Tensor:
                optimizer.zero_grad()
                loss = next_token_loss(model, batch, number)
                loss.backward()
                return loss

            optimizer.step(closure)

    if merged:
        with pytest.raises(LoraProbeError) as caught, monitor(model, optimizer) as probe:
            steps()
        assert [(f.code, f.step) for f in caught.value.findings] == [("LP103", 0)]
    else:
        with monitor(model, optimizer) as probe:
            steps()
        assert_healthy(probe.report, 5)
    assert_no_trace(model, optimizer)


# --- several optimizers, several models ----------------------------------------------------------


def test_a_and_b_in_two_optimizers() -> None:
    """LoRA+ by hand: a rate for A and one for B."""
    model = lora()
    parts = [[p for n, p in model.named_parameters() if part in n] for part in ("lora_A", "lora_B")]
    first, second = AdamW(parts[0], lr=1e-4), AdamW(parts[1], lr=1e-3)
    with monitor(model, [first, second]) as probe:
        for number, batch in enumerate(batches(6)):
            next_token_loss(model, batch, number).backward()
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
    assert_healthy(probe.report, 6)
    assert probe.report.metrics["lora_probe/identity/optimizer_coverage"] == 1.0
    assert_no_trace(model, first)
    assert_no_trace(model, second)


def test_forgotten_second_optimizer_is_reported() -> None:
    model = lora()
    first = AdamW([p for n, p in model.named_parameters() if "lora_A" in n], lr=1e-4)
    with pytest.raises(LoraProbeError, match="4 of 8 adapter tensors are in no optimizer"), monitor(model, first):
        loop(model, first)


class Value(nn.Module):
    """A value network with an adapter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = lora(base=llama(layers=1))
        self.head = nn.Linear(VOCABULARY, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.trunk(input_ids=ids).logits).squeeze(-1)


@pytest.mark.filterwarnings("ignore::lora_probe_callbacks.LoraProbeWarning")
@pytest.mark.parametrize("last", ["head", "body"])
def test_optimizer_of_the_head_steps_before_or_after_that_of_the_adapter(last: str) -> None:
    model = Value()
    optimizers = [adamw(model.trunk), SGD(model.head.parameters(), lr=0.1)]
    in_order = optimizers if last == "head" else optimizers[::-1]
    with monitor(model, optimizers, on_failure="warn") as probe:
        for number, batch in enumerate(batches(8)):
            if number == 5:
                model.trunk.base_model.disable_adapter_layers()
            model(batch).pow(2).mean().backward()
            for optimizer in in_order:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    assert [(f.code, f.step) for f in probe.report.failures] == [("LP102", 5)]
    assert probe.report.judged_steps == 8


def actor_critic(policy: nn.Module, value: nn.Module, optimizers: list[Optimizer], steps: int = 6) -> None:
    for batch in batches(steps):
        estimate = value(batch)[:, 1:]
        log_probs = policy(input_ids=batch).logits[:, :-1].log_softmax(-1).gather(-1, batch[:, 1:, None])[..., 0]
        reward = (batch[:, 1:] % 2).float()
        loss = -((reward - estimate.detach()) * log_probs).mean() + (reward - estimate).pow(2).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("shared", [True, False])
def test_policy_and_value_model(shared: bool) -> None:
    policy, value = lora(), Value()
    optimizers = [AdamW([*trainable(policy), *trainable(value)], lr=1e-3)] if shared else [adamw(policy), adamw(value)]
    with monitor([policy, value], optimizers) as probe:
        actor_critic(policy, value, optimizers)
    assert_healthy(probe.report, 6)
    assert not list(hooks_of_the_probe(value))
    value.trunk.merge_adapter()
    with pytest.raises(LoraProbeError) as caught, monitor([policy, value], optimizers):
        actor_critic(policy, value, optimizers)
    assert caught.value.findings[0].code in ("LP103", "LP106")
    assert caught.value.findings[0].step == 0


# --- gradient scalers ----------------------------------------------------------------------------


def scaled_loop(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    steps: int = 8,
    *,
    set_to_none: bool = True,
    unscale: bool = False,
    change: Callable[[Tensor, int], Tensor] = lambda loss, number: loss,
) -> None:
    for number, batch in enumerate(batches(steps)):
        loss = change(next_token_loss(model, batch, number), number)
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trainable(model), 1e6)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=set_to_none)


def scaler(scale: float = 2.0**10) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)


def overflow_in(*steps: int) -> Callable[[Tensor, int], Tensor]:
    return lambda loss, number: faults.overflowing(loss) if number in steps else loss


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_first_overflows_are_quiet_and_endless_ones_are_reported(fused: bool, unscale: bool, set_to_none: bool) -> None:
    model = lora()
    optimizer = AdamW(trainable(model), lr=1e-3, fused=fused)
    grad_scaler = scaler()
    options = {"set_to_none": set_to_none, "unscale": unscale}
    with monitor(model, optimizer, scaler=grad_scaler) as probe:
        scaled_loop(model, optimizer, grad_scaler, change=overflow_in(0, 1, 2), **options)
    assert_healthy(probe.report, 8, "LP406", "LP501")

    with pytest.raises(LoraProbeError) as caught, monitor(model, optimizer, scaler=grad_scaler) as probe:
        scaled_loop(model, optimizer, grad_scaler, 20, change=overflow_in(*range(20)), **options)
    assert [f.code for f in probe.report.with_status("fail", "warn")] == ["LP406"]
    assert caught.value.findings[0].step == 3
    assert_no_trace(model, optimizer)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_norms_are_unscaled(fused: bool, unscale: bool) -> None:
    def norms(grad_scaler: torch.amp.GradScaler | None) -> list[dict[str, float]]:
        model, rows = lora(), {}
        optimizer = AdamW(trainable(model), lr=1e-3, fused=fused)
        log = lambda row, step: rows.setdefault(step, {}).update(row)  # noqa: E731
        with monitor(model, optimizer, scaler=grad_scaler, log=log):
            if grad_scaler is None:
                loop(model, optimizer)
            else:
                scaled_loop(model, optimizer, grad_scaler, 6, unscale=unscale)
        return [{k: v for k, v in rows[step].items() if "gradient/norm" in k} for step in sorted(rows)]

    plain, scaled = norms(None), norms(scaler(2.0**16))
    assert len(plain) == 6
    for expected, got in zip(plain, scaled, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_fault_under_a_scaler_is_found(fused: bool) -> None:
    model = lora(hook=True)
    optimizer, grad_scaler = AdamW([{"params": trainable(model)}], lr=1e-3, fused=fused), scaler()

    def change(loss: Tensor, number: int) -> Tensor:
        if number == 2:
            faults.left_merged(model)  # takes effect in the forward of step 3
        return loss

    # Without a single gradient an unfused step is loud ("No inf checks were recorded"), and comes before ours.
    expected = LoraProbeError if fused else AssertionError
    with pytest.raises(expected) as caught, monitor(model, optimizer, scaler=grad_scaler) as probe:
        scaled_loop(model, optimizer, grad_scaler, change=change)
    assert [(f.code, f.step) for f in probe.report.failures] == [("LP103", 3)]
    assert fused or ["LP103" in note for note in caught.value.__notes__] == [True]


# --- Accelerate ----------------------------------------------------------------------------------


class Kept(GeneralTracker):
    """A tracker of the user's own."""

    name, requires_logging_directory = "kept", False

    @on_main_process
    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    @property
    def tracker(self) -> dict[int, dict[str, float]]:
        return self.rows

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        self.rows.setdefault(step, {}).update(values)


@pytest.fixture
def accelerators() -> Iterator[Callable[..., Accelerator]]:
    """Accelerate keeps its state for the whole process."""

    def forget() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    forget()
    yield lambda **options: Accelerator(cpu=True, **options)
    forget()


def accelerated(accelerator: Accelerator, model: nn.Module, optimizer: Any, steps: int, on_step: Any = None) -> int:
    done = 0
    for number, batch in enumerate(batches(steps)):
        if on_step is not None:
            on_step(number)
        with accelerator.accumulate(model):
            accelerator.backward(next_token_loss(model, batch, number))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        done += 1
        if accelerator.check_trigger():
            break
    return done


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_prepared_model_and_optimizer(accelerators: Any, precision: str, accumulate: int) -> None:
    tracker = Kept()
    accelerator = accelerators(mixed_precision=precision, gradient_accumulation_steps=accumulate, log_with=tracker)
    accelerator.init_trackers("test")
    model = lora()
    optimizer = adamw(model)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    with monitor(prepared, wrapped, accelerator=accelerator) as probe:
        accelerated(accelerator, prepared, wrapped, 6 * accumulate)
    assert_healthy(probe.report, 6)
    rows = accelerator.get_tracker("kept").rows
    assert list(rows) == list(range(6))
    assert rows[5]["lora_probe/healthy"] == 1.0
    assert rows[5]["lora_probe/update/relative_norm"] > 0
    assert_no_trace(prepared, optimizer)


def test_scaler_of_the_accelerator_is_used(accelerators: Any) -> None:
    accelerator = accelerators()
    accelerator.scaler = scaler()  # Accelerate makes one for a GPU only
    model = lora()
    optimizer = adamw(model)
    prepared, wrapped = accelerator.prepare(model, optimizer)

    def overflow_for_ever() -> None:
        for number, batch in enumerate(batches(20)):
            accelerator.backward(faults.overflowing(next_token_loss(prepared, batch, number)))
            wrapped.step()
            wrapped.zero_grad()

    with pytest.raises(LoraProbeError) as caught, monitor(prepared, wrapped, accelerator=accelerator) as probe:
        overflow_for_ever()
    assert [(f.code, f.step) for f in caught.value.findings] == [("LP406", 3)]
    assert probe.report.judged_steps == 4


def test_stop_sets_the_trigger_and_raises_nothing(accelerators: Any) -> None:
    accelerator, model = accelerators(), lora(hook=True)
    optimizer = adamw(model)
    prepared, wrapped = accelerator.prepare(model, optimizer)

    def on_step(number: int) -> None:
        if number == 2:
            faults.left_merged(model)

    with monitor(prepared, wrapped, accelerator=accelerator, on_failure="stop") as probe:
        assert accelerated(accelerator, prepared, wrapped, 8, on_step) == 3
        assert probe.should_stop
    assert [(f.code, f.step) for f in probe.report.failures] == [("LP103", 2)]
    assert_no_trace(prepared, optimizer)


# --- policies ------------------------------------------------------------------------------------


def test_stop_in_a_plain_loop() -> None:
    model = lora(hook=True)
    optimizer, steps = adamw(model), 0
    with monitor(model, optimizer, on_failure="stop") as probe:
        for number, batch in enumerate(batches(8)):
            if number == 2:
                faults.left_merged(model)
            next_token_loss(model, batch, number).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if probe.should_stop:
                break
    assert steps == 3
    assert [(f.code, f.step) for f in probe.report.failures] == [("LP103", 2)]
    assert_no_trace(model, optimizer)


def test_warn_warns_once_and_goes_on() -> None:
    model = lora(hook=True)
    run = Training(model, optimizer=adamw(model), between_steps=from_step(2, lambda run: faults.left_merged(model)))
    with pytest.warns(LoraProbeWarning, match="LP103") as caught:
        fit_plain(run, probe := monitor(model, run.optimizer, on_failure="warn"), 8)
    assert len([w for w in caught if issubclass(w.category, LoraProbeWarning)]) == 1
    assert [(f.code, f.step, f.count) for f in probe.report.failures] == [("LP103", 2, 6)]


def test_error_that_was_swallowed_is_raised_again() -> None:
    model = lora(hook=True)
    optimizer, swallowed = adamw(model), []
    faults.left_merged(model)

    def swallow() -> None:
        for number, batch in enumerate(batches(3)):
            try:
                next_token_loss(model, batch, number).backward()
                optimizer.step()
            except Exception as error:
                swallowed.append(type(error))

    with pytest.raises(LoraProbeError), monitor(model, optimizer, on_failure="raise"):
        swallow()
    assert swallowed == [LoraProbeError] * 3
    assert_no_trace(model, optimizer)


# --- leaving the loop ----------------------------------------------------------------------------


class TroubleError(RuntimeError):
    """What the user's own code raises."""


class TroubledBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        raise TroubleError("backward")


@pytest.mark.parametrize("where", ["loop", "backward", "forward", "interrupt", "generator"])
@pytest.mark.parametrize("step", [0, 2])
def test_nothing_is_left_after_an_exception(where: str, step: int) -> None:
    model = lora()
    optimizer = adamw(model)
    before = {n: set(vars(m)) for n, m in model.named_modules()}

    def steps() -> Iterator[int]:
        with monitor(model, optimizer):
            for number, batch in enumerate(batches(4)):
                loss = next_token_loss(model, batch, number)
                if number == step and where == "interrupt":
                    raise KeyboardInterrupt
                if number == step and where == "loop":
                    raise TroubleError
                if number == step and where == "forward":
                    model(input_ids=batch, labels=batch[:, :3])
                if number == step and where == "backward":
                    loss = TroubledBackward.apply(loss)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                yield number

    expected = {"interrupt": KeyboardInterrupt, "forward": ValueError, "generator": GeneratorExit}.get(
        where, TroubleError
    )
    running = steps()
    if where == "generator":  # a loop that its consumer leaves
        next(running)
        running.close()
    else:
        with pytest.raises(expected) as caught:
            list(running)
        assert not getattr(caught.value, "__notes__", [])
    assert_no_trace(model, optimizer)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    again = monitor(model, optimizer)
    with again:
        loop(model, optimizer)
    assert_healthy(again.report, 6)


def test_users_exception_says_why_there_is_no_gradient() -> None:
    model = lora()
    optimizer = adamw(model)
    faults.left_merged(model)
    with pytest.raises(RuntimeError, match="does not require grad") as caught, monitor(model, optimizer) as probe:
        loop(model, optimizer)
    assert ["LP103" in note for note in caught.value.__notes__] == [True]
    assert probe.report.exit_code == 1


# --- bad input -----------------------------------------------------------------------------------


def test_monitor_is_entered_once() -> None:
    model = lora()
    optimizer = adamw(model)
    probe = monitor(model, optimizer)
    with probe, pytest.raises(RuntimeError, match="expected a new one"):
        probe.__enter__()
    with pytest.raises(RuntimeError, match="make one for each run"), probe:
        pass
    assert_no_trace(model, optimizer)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m, o: monitor(llama(), o), ValueError, "found no PEFT adapter"),
        (lambda m, o: monitor(m, o, adapter="other"), ValueError, "expected names among \\['default'\\]"),
        (lambda m, o: monitor(m, m), TypeError, "expected a torch.optim.Optimizer"),
        (lambda m, o: monitor(m, []), ValueError, "expected at least one"),
        (lambda m, o: monitor([], o), TypeError, "expected a torch.nn.Module or a list of at least one"),
        (lambda m, o: monitor(o, m), TypeError, "expected a torch.nn.Module"),
        (lambda m, o: monitor(m, o, every_n_steps=0), ValueError, "expected an integer of at least 1"),
        (lambda m, o: monitor(m, o, verbos=False), TypeError, "verbos"),
    ],
    ids=["no adapter", "name", "no optimizer", "empty", "no model", "swapped", "cadence", "argument"],
)
def test_what_cannot_be_meant_is_refused_and_leaves_nothing(make: Any, error: type[Exception], words: str) -> None:
    model = lora()
    optimizer = adamw(model)
    with pytest.raises(error, match=words), make(model, optimizer):
        pass
    assert_no_trace(model, optimizer)


def not_called(model: PeftModel, optimizer: Optimizer) -> None:
    other = lora()
    other_optimizer = adamw(other)
    loop(other, other_optimizer, 5)


def never_stepped(model: PeftModel, optimizer: Optimizer) -> None:
    for number, batch in enumerate(batches(6)):
        next_token_loss(model, batch, number).backward()
        model.zero_grad()


def nothing(model: PeftModel, optimizer: Optimizer) -> None:
    pass


def stepped_alone(model: PeftModel, optimizer: Optimizer) -> None:
    for _ in range(5):
        optimizer.step()


@pytest.mark.parametrize(
    ("body", "healthy", "codes"),
    [
        (nothing, None, []),
        (not_called, None, []),
        (stepped_alone, False, ["LP209"]),
        (never_stepped, False, ["LP401"]),
    ],
)
def test_loop_that_is_not_the_one_that_was_meant(body: Any, healthy: bool | None, codes: list[str]) -> None:
    model = lora()
    optimizer = adamw(model)
    probe = monitor(model, optimizer)
    with pytest.raises(LoraProbeError) if codes else contextlib.nullcontext(), probe:
        body(model, optimizer)
    report = probe.report
    assert report.healthy is healthy, str(report)
    assert report.exit_code == {None: 2, False: 1}[healthy]
    assert {f.code for f in report.failures} <= set(codes), str(report)
    assert bool(report.failures) == bool(codes)
    assert not report.with_status("warn"), str(report)
    if healthy is None:
        said = {f.code: f.message for f in report.with_status("pending", "skipped")}
        assert said["LP209"] == "the model was never called with gradients enabled while the probe was watching"
        assert {"LP101", "LP103", "LP302", "LP401", "LP404", "LP406", "LP501"} <= said.keys()
        assert all(said.values()), "what was not judged says why"


def test_optimizer_of_another_model_is_reported() -> None:
    model, other = lora(), lora()
    with pytest.raises(LoraProbeError) as caught, monitor(model, adamw(other)):
        loop(model, adamw(model))
    assert [(f.code, f.step) for f in caught.value.findings] == [("LP202", 0)], str(caught.value)
    assert "belong to another model" in str(caught.value)


def test_report_taken_before_training_follows_the_run() -> None:
    model = lora(hook=True)
    optimizer = adamw(model)
    probe = monitor(model, optimizer)

    def train() -> None:
        with probe:
            reports.append(probe.report)
            loop(model, optimizer)
            assert reports[0].healthy is True
            assert {"LP101", "LP302", "LP401"} <= {f.code for f in reports[0].with_status("pass")}
            faults.left_merged(model)
            loop(model, optimizer)

    reports: list[ProbeReport] = []
    with pytest.raises(LoraProbeError):
        train()
    assert [f.code for f in reports[0].failures] == ["LP103"]
    assert reports[0].findings == probe.report.findings


# --- two optimizers, each with a layer of its own -------------------------------------------------


def two_optimizers(model: nn.Module) -> list[Optimizer]:
    tensors = trainable(model)
    return [AdamW(tensors[:4], lr=1e-3), AdamW(tensors[4:], lr=1e-3)]


def test_gradient_that_is_gone_by_the_next_reading_is_missing() -> None:
    """The second optimizer is read after the decision of one step, and decides the next one."""
    model = lora()
    optimizers = two_optimizers(model)
    with monitor(model, optimizers, on_failure="stop") as probe:
        for number, batch in enumerate(batches(10)):
            next_token_loss(model, batch, number).backward()
            if number % 2:
                optimizers.reverse()
                for tensor in trainable(model)[4:6]:
                    tensor.grad = None
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            optimizers.sort(key=lambda o: o.param_groups[0]["params"][0] is not trainable(model)[0])
    fractions = [row["lora_probe/reachability/loss_fraction"] for row in probe.report.history.rows.values()]
    assert fractions[:4] == [1.0, 0.5, 1.0, 0.5]
    assert [f.code for f in probe.report.failures] == ["LP302"]


def test_tensor_that_changes_its_shape_between_two_updates_of_one_step() -> None:
    model = lora()
    first, second = two_optimizers(model)
    tensor = trainable(model)[0]
    with monitor(model, [first, second]) as probe:
        for number, batch in enumerate(batches(8)):
            next_token_loss(model, batch, number).backward()
            first.step()
            if number == 5:
                shape, tensor.grad = tensor.shape, None
                tensor.data = tensor.data.flatten()
                first.step()
                tensor.data = tensor.data.view(shape)
            second.step()
            first.zero_grad()
            second.zero_grad()
    assert not probe.report.internal_errors, probe.report.internal_errors
    assert probe.report.healthy is True, str(probe.report)


@pytest.mark.filterwarnings("ignore::lora_probe_callbacks.LoraProbeWarning")
def test_norm_of_gradients_is_nan_where_one_of_them_is() -> None:
    """A gradient that is NaN was there: the norm over all must not leave it out."""
    model = lora()
    optimizer = SGD(trainable(model), lr=1e-2)
    rows: dict[int, dict[str, float]] = {}

    def log(values: dict[str, float], step: int) -> None:
        rows.setdefault(step, {}).update(values)

    with monitor(model, optimizer, on_failure="warn", log=log):
        for number, batch in enumerate(batches(4)):
            next_token_loss(model, batch, number).backward()
            if number == 2:
                broken = next(p for name, p in model.named_parameters() if "lora_A" in name)
                assert broken.grad is not None
                broken.grad.fill_(float("nan"))
            optimizer.step()
            optimizer.zero_grad()
    norms = [rows[step]["lora_probe/gradient/norm_A"] for step in sorted(rows)][:3]
    assert [math.isnan(norm) for norm in norms] == [False, False, True], rows
