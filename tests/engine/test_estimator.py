"""A VarianceProbe inside training: its numbers, its order and identity, its failures, and no trace of it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support.doors import DOORS, autocast, fit_plain, fit_trainer, new_scaler, watch_through
from support.facts import bad, facts
from support.facts import reached_estimator as fact
from support.normalised import normalised, vectors
from support.policies import INTENT, E, policy
from support.training import (
    Training,
    adamw,
    adapter_tensors,
    batches,
    fit_lightning,
    llama,
    lora,
    next_token_loss,
    trained,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from lora_probe_callbacks import (
    LoraProbe,
    LoraProbeError,
    LoraProbeMonitor,
    LoraProbeTrainerCallback,
    VarianceEstimatorCallback,
    preflight,
)
from lora_probe_callbacks.estimators import (
    UpdateDirection,
    VarianceProbe,
    conditional_variance,
    first_order_change,
    per_prompt_projection,
    skewed_interval,
    spread,
)
from lora_probe_callbacks.report.page import page
from lora_probe_callbacks.report.runs import read_runs

DIRECTIONS = ("from_last_step", "from_gradients", "adam_preconditioned", "from_optimizer_step")
NAMES = {"delta_1", "standard_error", "conditional_variance", "signal_to_noise", "count", "cosine"}
NAMES |= {"lower", "upper", "zeros", "largest"}
ESTIMATOR_CODES = ("LP204", "LP205", "LP304", "LP305", "LP306")


def language_model(module: nn.Module) -> nn.Module:
    """What the front doors hand to a loss function: under Lightning the LightningModule."""
    return module.model if hasattr(module, "training_step") else module


def nll(module: nn.Module, batch: Any) -> Tensor:
    """The negative log-likelihood of each row, [B]."""
    ids = batch["input_ids"] if isinstance(batch, dict) else batch
    log_p = language_model(module)(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None])[..., 0].mean(1)


def model(**changes: Any) -> nn.Module:
    made = lora(**changes)
    torch.manual_seed(0)
    trained(made)
    return made


def numbers(report: Any) -> dict[str, float]:
    prefix = "lora_probe/estimator/"
    return {k.removeprefix(prefix): v for k, v in report.metrics.items() if k.startswith(prefix)}


# --- the numbers --------------------------------------------------------------------------------


def by_hand(direction: str) -> dict[str, float]:
    """One step of the same training, and the estimators called as their documentation says."""
    hand = model()
    optimizer = adamw(hand)
    for step in range(3):
        next_token_loss(hand, batches(3)[step], step).backward()
        if step < 2:
            optimizer.step()
            optimizer.zero_grad()
    before = {n: p.detach().clone() for n, p in hand.named_parameters() if p.requires_grad}
    if direction == "from_gradients":
        mu = UpdateDirection.from_gradients(hand, lr=1e-3)
    elif direction == "adam_preconditioned":
        mu = UpdateDirection.adam_preconditioned(UpdateDirection.from_gradients(hand, lr=1e-3), hand, optimizer)
    elif direction == "from_optimizer_step":
        mu = UpdateDirection.from_optimizer_step(hand, optimizer)
    else:
        optimizer.step()
        mu = UpdateDirection.from_last_step(hand, before)
    s = per_prompt_projection(hand, lambda m: nll(m, E), mu)
    mu_X = UpdateDirection.from_loss(hand, lambda m: nll(m, E), lr=1.0)
    delta_1, variance = float(first_order_change(s, mu.scale)), float(conditional_variance(s, mu.scale))
    return {
        "delta_1": delta_1,
        "standard_error": variance**0.5,
        "conditional_variance": variance,
        "signal_to_noise": abs(delta_1) / variance**0.5,
        "count": 6.0,
        "cosine": mu_X.cosine(mu),
        "lower": skewed_interval(s, mu.scale)[0],
        "upper": skewed_interval(s, mu.scale)[1],
        "zeros": float((s == 0).double().mean()),
        "largest": spread(s).largest,
    }


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logged_numbers_are_those_of_the_estimators_called_by_hand(door: str, direction: str) -> None:
    estimator = VarianceProbe(lambda step: E, nll, direction, every_n_steps=2)
    watched = watch_through(door, Training(model()), steps=3, estimator=estimator)
    assert not watched.found, watched.found
    assert watched.error is None
    assert numbers(watched.report) == pytest.approx(by_hand(direction), rel=1e-6)
    assert watched.report.metrics["lora_probe/reachability/estimator_fraction"] == 1.0
    passed = {f.code for f in watched.report.with_status("pass")}
    assert set(ESTIMATOR_CODES) <= passed


def test_clipping_by_lightning_comes_before_the_direction() -> None:
    clipped = {}
    for value in (None, 1e-3):
        probe = VarianceEstimatorCallback([E], nll, "from_gradients", estimate_every_n_steps=2, verbose=False)
        fit_lightning(Training(model()), probe, 3, gradient_clip_val=value)
        clipped[value] = abs(numbers(probe.report)["delta_1"])
    assert clipped[1e-3] < 0.1 * clipped[None]


def test_rows_go_to_the_loggers_at_the_step_of_the_estimator() -> None:
    rows: list[tuple[int, dict[str, float]]] = []
    run = Training(model())
    probe = LoraProbeMonitor(
        run.model,
        run.built_optimizer(),
        verbose=False,
        estimator=VarianceProbe([E], nll, every_n_steps=3),
        log=lambda metrics, step: rows.append((step, metrics)),
    )
    fit_plain(run, probe, 8)
    logged = [(step, row) for step, row in rows if "lora_probe/estimator/delta_1" in row]
    assert [step for step, _ in logged] == [0, 3, 6]  # whether or not the probe itself looks at that step
    assert all({f"lora_probe/estimator/{name}" for name in NAMES} == set(row) for _, row in logged)


def test_share_of_the_next_training_batch() -> None:
    """No gradient has seen it when the direction is made."""
    data = batches(4, size=8)
    run = Training(model())
    probe = LoraProbeMonitor(
        run.model, run.built_optimizer(), verbose=False, estimator=VarianceProbe(0.5, nll, every_n_steps=2)
    )
    reference = model()
    optimizer = adamw(reference)
    with probe:
        for step, batch in enumerate(data):
            next_token_loss(run.model, batch, step).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
    for step in range(3):
        next_token_loss(reference, data[step], step).backward()
        before = {n: p.detach().clone() for n, p in reference.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
    mu = UpdateDirection.from_last_step(reference, before)
    s = per_prompt_projection(reference, lambda m: nll(m, data[3][4:]), mu)
    assert numbers(probe.report)["delta_1"] == pytest.approx(float(s.mean()), rel=1e-6)
    assert numbers(probe.report)["count"] == 4


def test_loop_with_a_closure_gives_the_same_numbers() -> None:
    """Its gradients are made inside step(): what the estimator starts from is kept before."""
    assert fitted_with(closure=True) == fitted_with(closure=False)


def fitted_with(*, closure: bool) -> tuple[dict[str, float], float]:
    run = Training(model())
    optimizer = run.built_optimizer()
    probe = LoraProbeMonitor(run.model, optimizer, verbose=False, estimator=VarianceProbe([E], nll))
    with probe:
        for number, batch in enumerate(batches(3)):

            def evaluate(batch: Tensor = batch, number: int = number) -> Tensor:
                optimizer.zero_grad()
                loss = next_token_loss(run.model, batch, number)
                loss.backward()
                return loss

            if not closure:
                evaluate()
            optimizer.step(evaluate if closure else None)
    assert not probe.report.with_status("fail", "warn")
    return numbers(probe.report), probe.report.metrics["lora_probe/step_response/ratio"]


def test_preflight_runs_it_and_leaves_no_trace() -> None:
    made = model(lora_dropout=0.3)
    optimizer = adamw(made)
    before = [p.detach().clone() for p in made.parameters()]
    state = torch.get_rng_state()
    batch = batches(1)[0]
    estimator = VarianceProbe([E], nll, "from_optimizer_step")
    report = preflight(made, optimizer, {"input_ids": batch, "labels": batch}, estimator=estimator)
    assert set(numbers(report)) == NAMES
    assert {"LP205", "LP304", "LP305", "LP901"} <= {f.code for f in report.with_status("pass")}
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))
    assert not optimizer.state
    assert all(p.grad is None for p in made.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    other = copy.deepcopy(made)
    report = preflight(
        made,
        optimizer,
        {"input_ids": batch, "labels": batch},
        estimator=VarianceProbe([E], lambda _, batch: nll(other, batch)),
    )
    assert [(f.code, f.status) for f in report.with_status("fail", "warn")] == [("LP205", "fail")]


def test_loader_begins_again_at_its_end() -> None:
    taken: list[int] = []

    class Loader:
        def __iter__(self) -> Any:
            for number, rows in enumerate(E.split(3)):
                taken.append(number)
                yield rows

    watch_through("plain", Training(model()), steps=4, estimator=VarianceProbe(Loader(), nll, every_n_steps=1))
    assert taken == [0, 1, 0, 1]


def test_predicted_change_of_the_training_loss_is_the_measured_one() -> None:
    """The share of one on the step's own batch would be biased; on the same rows delta_1 is the step response."""
    batch = batches(1, size=6)[0]
    run = Training(model(), loss=lambda m, b, step: nll(m, batch).mean())
    watched = watch_through(
        "plain", run, steps=1, estimator=VarianceProbe([batch], nll, "from_optimizer_step", every_n_steps=1)
    )
    assert numbers(watched.report)["delta_1"] == pytest.approx(
        watched.report.metrics["lora_probe/step_response/predicted"], rel=1e-4
    )


# --- what can be wrong with it --------------------------------------------------------------------


def estimator_of(loss: Callable[[nn.Module, Any], Tensor], **settings: Any) -> VarianceProbe:
    return VarianceProbe([E], loss, **{"every_n_steps": 1, **settings})


@pytest.mark.parametrize("door", DOORS)
def test_estimator_on_a_copy_of_the_model(door: str) -> None:
    made = model()
    other = copy.deepcopy(made)
    watched = watch_through(
        door, Training(made), estimator=estimator_of(lambda _, batch: nll(other, batch)), every_n_steps=1
    )
    assert watched.found == [("LP205", "fail", 0)], watched.found
    assert isinstance(watched.error, LoraProbeError)
    finding = watched.report.failures[0]
    assert "runs on another module" in finding.message
    assert not numbers(watched.report)
    assert {"LP101", "LP301", "LP302"} <= {f.code for f in watched.report.with_status("pass")}


@pytest.mark.parametrize("door", DOORS)
def test_estimator_before_set_adapter(door: str) -> None:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        inner = language_model(module)
        inner.base_model.set_adapter("default", inference_mode=True)
        L = nll(module, batch)
        inner.set_adapter("policy")
        return L

    watched = watch_through(door, Training(policy()), estimator=estimator_of(loss), every_n_steps=1, **INTENT)
    assert watched.found == [("LP105", "fail", 0)], watched.found
    assert "at the forward of estimator 'estimator'" in watched.report.failures[0].message


@pytest.mark.parametrize(
    ("code", "wrap"),
    [
        (
            "LP101",
            lambda m, b: _under(m, b, lambda inner: inner.base_model.set_adapter("default", inference_mode=True)),
        ),
        ("LP102", lambda m, b: _under(m, b, lambda inner: inner.base_model.disable_adapter_layers())),
        ("LP304", lambda m, b: nll(m, b).detach()),
        ("LP306", torch.no_grad()(nll)),
        ("LP306", torch.inference_mode()(nll)),
    ],
    ids=["inactive", "disabled", "detached", "no_grad", "inference_mode"],
)
def test_fault_in_the_loss_of_the_estimator(code: str, wrap: Callable[[nn.Module, Any], Tensor]) -> None:
    watched = watch_through("plain", Training(policy()), estimator=estimator_of(wrap), every_n_steps=1, **INTENT)
    assert watched.found == [(code, "fail", 0)], (watched.found, watched.report.failures)


def _under(module: nn.Module, batch: Any, change: Callable[[Any], None]) -> Tensor:
    """The state is put back by the estimator itself; whoever looks afterwards finds everything in order."""
    change(language_model(module))
    return nll(module, batch)


def test_surrogate_without_a_signal_is_healthy_once_and_fails_in_the_end() -> None:
    def masked(module: nn.Module, batch: Any) -> Tensor:
        return 0.0 * nll(module, batch)

    watched = watch_through("plain", Training(model()), estimator=estimator_of(masked), every_n_steps=1)
    assert watched.found == [("LP305", "fail", 3)]
    watched = watch_through(
        "plain", Training(model()), estimator=estimator_of(masked, every_n_steps=3), every_n_steps=1
    )
    assert not watched.found


def test_fault_that_begins_later_is_found_in_its_step() -> None:
    made = model()
    other = copy.deepcopy(made)
    calls: list[int] = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return nll(other if len(calls) > 3 else module, batch)

    watched = watch_through("plain", Training(made), steps=30, estimator=estimator_of(loss, every_n_steps=10))
    assert [(code, step) for code, _, step in watched.found] == [("LP205", 10)]


def test_callback_of_the_lightning_suite_watches_and_logs(tmp_path: Path) -> None:
    made = model()
    probe = VarianceEstimatorCallback([E], nll, estimate_every_n_steps=2, verbose=False, every_n_steps=1)
    logger = CSVLogger(tmp_path)
    fit_lightning(Training(made), probe, 4, logger=logger, log_every_n_steps=1)
    logged = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert {f"lora_probe/estimator/{name}" for name in NAMES} <= set(logged[0].split(","))
    assert set(ESTIMATOR_CODES) <= {f.code for f in probe.report.with_status("pass")}
    assert not any(f.code.startswith(("LP4", "LP5")) for f in probe.report.findings)

    other = copy.deepcopy(made)
    probe = VarianceEstimatorCallback([E], lambda _, b: nll(other, b), estimate_every_n_steps=1, verbose=False)
    with pytest.raises(LoraProbeError, match="LP205"):
        fit_lightning(Training(made), probe, 4)


# --- LP9: what an estimate is worth ---------------------------------------------------------------


def test_loss_that_mixes_prompts_is_not_trusted() -> None:
    def over_pairs(module: nn.Module, batch: Any) -> Tensor:
        L = nll(module, batch)
        return L + 0.5 * L.flip(0)

    watched = watch_through("plain", Training(model()), estimator=estimator_of(over_pairs), every_n_steps=1)
    assert watched.found == [("LP901", "warn", 0)]
    assert not numbers(watched.report)
    finding = watched.report.with_status("warn")[0]
    assert "disagrees with an ordinary backward" in finding.message
    assert "example_of_row" in finding.fix
    estimator = VarianceProbe([E], over_pairs, every_n_steps=1, backend="loop")
    watched = watch_through("plain", Training(model()), steps=3, estimator=estimator)
    assert not watched.found
    assert set(numbers(watched.report)) == NAMES


def test_two_prompts_are_too_few() -> None:
    for rows, found in ((2, [("LP902", "warn", 0)]), (4, [])):
        estimator = VarianceProbe([E[:rows]], nll, every_n_steps=1)
        assert watch_through("plain", Training(model()), steps=3, estimator=estimator).found == found
    # That nothing reaches the adapter is said by others.
    estimator = VarianceProbe([E[:2]], lambda m, b: nll(m, b).detach(), every_n_steps=1)
    assert watch_through("plain", Training(model()), steps=3, estimator=estimator).found == [("LP304", "fail", 0)]


def test_estimates_of_nothing_have_no_signal() -> None:
    pairs, sign = torch.cat([E[:3], E[:3]]), torch.tensor([1.0, 1, 1, -1, -1, -1])
    estimator = VarianceProbe([pairs], lambda m, b: sign * nll(m, b), every_n_steps=1)
    watched = watch_through("plain", Training(model()), steps=10, estimator=estimator)
    assert watched.found == [("LP903", "warn", 7)]
    assert watched.report.healthy


@pytest.mark.parametrize(
    ("recent", "status"),
    [
        ([(1.0, 0.1)] * 8, "pass"),
        ([(0.1, 0.1)] * 7, "pending"),
        ([(0.1, 0.1)] * 8, "pass"),  # noisy one by one, and of one sign: 2.8 standard errors together
        ([(0.1, 0.1), (-0.1, 0.1)] * 4, "warn"),
        ([(0.3, 0.1), (-0.3, 0.1)] * 4, "pass"),  # steps to and fro, each of them seen
        ([(0.0, 0.0)] * 8, "warn"),
    ],
)
def test_signal_is_judged_over_eight_estimates(recent: list[tuple[float, float]], status: str) -> None:
    what = facts(estimators=(fact(count=8, recent=tuple(recent)),))
    from lora_probe_callbacks.checks.estimator.no_signal import judge

    assert judge(what).status == status
    assert list(bad(what)) == (["LP903"] if status == "warn" else [])


# --- healthy ------------------------------------------------------------------------------------


def clipped(run: Training, number: int) -> None:
    run.built_optimizer().register_step_pre_hook(
        lambda o, *_: nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3) and None
    ) if number == 0 else None


def outside(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    log_p = model(input_ids=batch).logits[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, batch[:, 1:, None]).mean()


def with_cache(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    cache = DynamicCache()
    model(input_ids=batch[:, :4], past_key_values=cache, use_cache=True)
    return model(input_ids=batch[:, 4:], past_key_values=cache, labels=batch[:, 4:]).loss


def in_sixteen_bits() -> Training:
    small = lora(base=llama(torch.bfloat16))
    trained(small)
    for tensor in adapter_tensors(small).values():
        tensor.data = tensor.data.bfloat16()
    return Training(small, optimizer=lambda m: adamw(m, lr=1e-6))


HEALTHY: dict[str, Callable[[], Training]] = {
    "clipping": lambda: Training(model(), between_steps=clipped),
    "autocast around the step": lambda: Training(model(lora_dropout=0.3), precision="around"),
    "16 bits, lr 1e-6": in_sixteen_bits,
    "loss outside the model": lambda: Training(model(lora_dropout=0.3), outside),
    "a cache in the forward": lambda: Training(model(), with_cache),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_estimator_beside_healthy_training_is_quiet(name: str) -> None:
    run = HEALTHY[name]()
    optimizer = run.built_optimizer()
    ignored = ("LP401", "LP403") if "16 bits" in name else ()  # lr 1e-6 is below what 16 bits can hold
    probe = LoraProbeMonitor(
        run.model, optimizer, verbose=False, every_n_steps=1, ignore=ignored, estimator=estimator_of(nll)
    )
    with probe:
        for number, batch in enumerate(batches(6)):
            run.between_steps(run, number)
            with autocast("bf16-mixed") if run.precision == "around" else nullcontext():
                run.loss(run.model, batch, number).backward()
                optimizer.step()
            optimizer.zero_grad()
    assert not probe.report.with_status("fail", "warn")
    assert not probe.report.internal_errors
    assert set(numbers(probe.report)) == NAMES


def test_batch_norm_is_refused_by_name_and_fits_the_loop() -> None:
    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        return (module(batch[:, :8].float() / 32 - 1) - 1).square().mean(1)

    for backend, words in (("doubled_rank", "normalises over the batch"), ("loop", "")):
        run = Training(normalised(), vectors)
        buffers = [b.clone() for b in run.model.buffers()]
        watched = watch_through("plain", run, steps=3, estimator=VarianceProbe([E], loss, backend=backend))
        assert [code for code, _, _ in watched.found] == ["LP808"]  # running statistics, which no adapter file holds
        assert (set(numbers(watched.report)) == NAMES) == (backend == "loop")
        finding = next(f for f in watched.report.findings if f.code == "LP305")
        assert words in finding.message
        assert any(not torch.equal(a, b) for a, b in zip(buffers, run.model.buffers(), strict=True))


def test_nothing_differentiates_with_respect_to_a_frozen_base() -> None:
    made = model()
    frozen = [p for n, p in made.named_parameters() if "lora_" not in n]
    seen: list[bool] = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        seen.extend(p.requires_grad for p in frozen)
        return nll(module, batch)

    watched = watch_through("plain", Training(made), steps=2, estimator=estimator_of(loss))
    assert not watched.found
    assert seen
    assert not any(seen)
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_checkpointing_and_dropout_are_healthy(reentrant: bool | None) -> None:
    made = model(lora_dropout=0.3)
    if reentrant is not None:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        made.enable_input_require_grads()
    watched = watch_through("plain", Training(made), estimator=estimator_of(nll), every_n_steps=1)
    assert not watched.found, watched.found
    assert set(numbers(watched.report)) == NAMES


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("door", DOORS)
def test_mixed_precision_is_healthy(door: str, precision: str) -> None:
    run = Training(model(), precision=precision)
    watched = watch_through(door, run, steps=8, estimator=estimator_of(nll), every_n_steps=1)
    assert not watched.found, watched.found
    assert set(numbers(watched.report)) == NAMES


def test_accumulation_is_healthy() -> None:
    watched = watch_through("plain", Training(model(), accumulate=4), estimator=estimator_of(nll), every_n_steps=1)
    assert not watched.found
    assert set(numbers(watched.report)) == NAMES


# --- it fails, and training goes on ----------------------------------------------------------------


class Held:
    """Something large that a failing estimator must let go of."""


@pytest.mark.parametrize(
    ("batches_of", "error", "words"),
    [
        ([E], torch.OutOfMemoryError("out of memory"), "OutOfMemoryError"),
        ([], None, "the loader of the estimator is empty"),
        ([E], "nan", "NaN or infinity"),
        ([E[:1]], None, "B >= 2"),
        (lambda step: 1 / 0, None, "ZeroDivisionError"),
    ],
    ids=["memory", "empty", "nan", "one prompt", "batches"],
)
def test_failing_estimator_leaves_training_alone(batches_of: Any, error: Any, words: str) -> None:
    held: list[weakref.ref[Held]] = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        large = Held()
        held.append(weakref.ref(large))
        L = nll(module, batch)
        if isinstance(error, Exception):
            raise error
        return L * float("nan") if error else L

    results = []
    for estimator in (None, VarianceProbe(batches_of, loss, every_n_steps=1)):
        run = Training(model())
        watched = watch_through("plain", run, steps=6, estimator=estimator)
        assert not watched.found
        assert watched.error is None
        assert watched.report.status == ("healthy" if estimator is None else "unproven")
        assert not numbers(watched.report)
        results.append(run.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))
    messages = {f.code: (f.status, f.message) for f in watched.report.findings if f.code in ESTIMATOR_CODES}
    assert messages["LP305"][0] == "skipped"
    assert words in messages["LP305"][1]
    assert messages["LP305"][1].startswith("could not judge")
    if isinstance(error, Exception):
        error.__traceback__ = None  # the test's own reference
    assert not any(reference() for reference in held)


def test_step_that_moved_nothing_has_no_direction() -> None:
    run = Training(model(), optimizer=lambda m: adamw(m, lr=0.0))
    watched = watch_through("plain", run, steps=3, estimator=estimator_of(nll))
    assert not watched.found
    finding = next(f for f in watched.report.findings if f.code == "LP204")
    assert "the step moved nothing" in finding.message


def test_memory_that_runs_out_before_the_step_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the adapter are what the estimator takes first."""
    import lora_probe_callbacks.engine.estimator as estimation

    def full(module: nn.Module) -> dict[str, nn.Parameter]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(estimation, "parameters", full)
    watched = watch_through("plain", Training(model()), steps=3, estimator=estimator_of(nll))
    assert not watched.found
    assert watched.report.status == "unproven"
    finding = next(f for f in watched.report.findings if f.code == "LP305")
    assert "OutOfMemoryError" in finding.message


def test_reason_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(model())
    fit_plain(
        run, LoraProbeMonitor(run.model, run.built_optimizer(), estimator=VarianceProbe([], nll, every_n_steps=1)), 6
    )
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("LoRA probe: estimator 'estimator': could not judge: ValueError: the loader") == 1


# --- no trace -----------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what reaches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_step_at_which_it_is_not_due_costs_no_operation_and_carries_no_hook() -> None:
    counts: dict[bool, list[int]] = {}
    for probed in (False, True):
        run = Training(model())
        optimizer = run.built_optimizer()
        estimator = VarianceProbe([E], nll, every_n_steps=100)
        probe = LoraProbeMonitor(run.model, optimizer, verbose=False, every_n_steps=100, estimator=estimator)
        counts[probed] = []
        with probe if probed else nullcontext():
            for number, batch in enumerate(batches(9)):
                with Operations() as operations:
                    next_token_loss(run.model, batch, number).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                counts[probed].append(operations.count)
                if number > 4:
                    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())
    assert counts[True][0] > counts[False][0]
    assert counts[True][6:] == counts[False][6:]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("door", DOORS)
def test_training_is_bit_equal_behind_every_door(door: str, precision: str) -> None:
    ended = []
    for probed in (False, True):
        run = Training(model(lora_dropout=0.3), precision=precision)
        intent: dict[str, Any] = {"verbose": False, "every_n_steps": 3, "estimator": estimator_of(nll)}
        torch.manual_seed(3)
        if door == "lightning":
            probe: Any = LoraProbe(**intent)
            fit_lightning(run, probe if probed else pl.Callback(), 6)
        elif door == "trainer":
            probe = LoraProbeTrainerCallback(**intent)
            fit_trainer(run, probe if probed else None, 6)
        else:
            scaler = new_scaler(run)
            probe = LoraProbeMonitor(run.model, run.built_optimizer(), scaler=scaler, **intent)
            fit_plain(run, probe if probed else nullcontext(), 6, scaler)
        assert bool(numbers(probe.report)) == probed
        values = [*run.model.state_dict().values(), torch.get_rng_state()]
        for state in run.built_optimizer().state_dict()["state"].values():
            values += [torch.as_tensor(v) for v in state.values()]
        ended.append(values)
    assert len(ended[0]) == len(ended[1])
    assert all(torch.equal(a, b) for a, b in zip(*ended, strict=True))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("batches_of", [lambda step: E, 0.5], ids=["callable", "share"])
def test_training_is_bit_equal(direction: str, batches_of: Any) -> None:
    class Shuffled:
        """Draws from the global random stream, as a loader does."""

        def __iter__(self) -> Any:
            yield E[torch.randperm(len(E))]

    def train(estimator: VarianceProbe | None, probed: bool) -> list[Any]:
        run = Training(model(lora_dropout=0.3))
        optimizer = run.built_optimizer()
        torch.manual_seed(3)
        gradients: list[Tensor] = []
        optimizer.register_step_pre_hook(
            lambda o, *_: gradients.extend(p.grad.clone() for p in o.param_groups[0]["params"])
        )
        probe = LoraProbeMonitor(run.model, optimizer, verbose=False, estimator=estimator, select=("LP2", "LP304"))
        if probed:
            fit_plain(run, probe, 8)
            assert numbers(probe.report)
        else:
            fit_plain(run, nullcontext(), 8)
        modes = [m.training for m in run.model.modules()], [p.requires_grad for p in run.model.parameters()]
        values = [*run.model.state_dict().values(), *gradients, torch.get_rng_state()]
        for state in optimizer.state_dict()["state"].values():
            values += [torch.as_tensor(v) for v in state.values()]
        return [values, modes, run.model.active_adapters]

    source = Shuffled() if batches_of != 0.5 else 0.5
    without = train(None, probed=False)
    watched = train(VarianceProbe(source, nll, direction, every_n_steps=2), probed=True)
    assert len(without[0]) == len(watched[0])
    assert all(torch.equal(a, b) for a, b in zip(without[0], watched[0], strict=True))
    assert without[1:] == watched[1:]


def test_nothing_is_kept_after_the_run() -> None:
    run = Training(model())
    probe = LoraProbeMonitor(run.model, run.built_optimizer(), verbose=False, estimator=VarianceProbe(0.5, nll))
    fit_plain(run, probe, 1)
    estimation = probe._session._estimates._estimation
    assert not estimation._before
    assert estimation._waiting is None
    assert estimation._inputs is None


# --- refused at construction --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1.5, nll), "a share of the rows"),
        ((True, nll), "share"),
        ((object(), nll), "a loader, a callable or a share"),
        (([E], nll, "sideways"), "direction got 'sideways'"),
        (([E], "nll"), "loss got str"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VarianceProbe(*arguments)


def test_something_else_as_an_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a VarianceProbe"):
        LoraProbeMonitor(llama(), None, estimator=nll)


# --- on the page --------------------------------------------------------------------------------


def test_page_draws_what_was_estimated_and_says_why_not(tmp_path: Path) -> None:
    def drawn(name: str, **settings: Any) -> str:
        record = tmp_path / f"{name}.jsonl"
        run = Training(model(), accumulate=2)
        probe = LoraProbeMonitor(run.model, run.built_optimizer(), verbose=False, record=record, **settings)
        fit_plain(run, probe, 12)
        return page(read_runs(record))

    failing = {"calls": 0}

    def sometimes(module: nn.Module, batch: Any) -> Tensor:
        failing["calls"] += 1
        if failing["calls"] == 1:
            raise torch.OutOfMemoryError("out of memory")
        return nll(module, batch)

    shown = drawn("sometimes", estimator=estimator_of(sometimes))
    assert 'aria-label="delta_1 over steps"' in shown
    assert "In some steps it was not computed: could not judge: OutOfMemoryError: out of memory." in shown
    assert 'aria-label="measured and predicted change over steps"' in shown
    shown = drawn("never", estimator=VarianceProbe([], nll, every_n_steps=1))
    assert "No estimate was computed: could not judge: ValueError: the loader of the estimator is empty" in shown


def test_record_holds_of_steps_between_probes_what_was_looked_at(tmp_path: Path) -> None:
    """Nothing but the estimator was: of the rest it is not too early to say, it was not asked."""
    run, record = Training(model()), tmp_path / "run.jsonl"
    probe = LoraProbeMonitor(
        run.model, run.built_optimizer(), verbose=False, record=record, every_n_steps=100, estimator=estimator_of(nll)
    )
    fit_plain(run, probe, 8)
    decisions = [d for d in read_runs(record)[0].decisions if d.moment == "step"]
    assert "LP101" in decisions[3].verdicts
    for decision in decisions[4:]:
        assert "LP101" not in decision.verdicts
        assert decision.verdicts["LP304"]["status"] == "pass"
    steps, fractions = probe.report.history.series("reachability/estimator_fraction")
    assert steps == list(range(8))
    assert set(fractions) == {1.0}
