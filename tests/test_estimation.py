"""A VarianceProbe inside training: its numbers, its order and identity, its failures, and no trace of it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from doors import DOORS, fit_plain, watch_through
from policies import INTENT, E, policy
from torch import Tensor, nn
from training import Training, adamw, batches, fit_lightning, llama, lora, next_token_loss, trained

from lora_probe_callbacks import LoraProbeError, LoraProbeMonitor, VarianceEstimatorCallback
from lora_probe_callbacks.estimators import (
    UpdateDirection,
    VarianceProbe,
    conditional_variance,
    first_order_change,
    per_prompt_projection,
)

DIRECTIONS = ("from_last_step", "from_gradients", "adam_preconditioned", "from_optimizer_step")
NAMES = {"delta_1", "standard_error", "conditional_variance", "signal_to_noise", "count", "cosine"}
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
        inner.set_adapter("default", inference_mode=True)
        L = nll(module, batch)
        inner.set_adapter("policy")
        return L

    watched = watch_through(door, Training(policy()), estimator=estimator_of(loss), every_n_steps=1, **INTENT)
    assert watched.found == [("LP105", "fail", 0)], watched.found
    assert "at the forward of estimator 'estimator'" in watched.report.failures[0].message


@pytest.mark.parametrize(
    ("code", "wrap"),
    [
        ("LP101", lambda m, b: _under(m, b, lambda inner: inner.set_adapter("default", inference_mode=True))),
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


# --- healthy ------------------------------------------------------------------------------------


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
        assert watched.report.healthy
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


# --- no trace -----------------------------------------------------------------------------------


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
    estimation = probe._session._estimation
    assert not estimation._before
    assert estimation._waiting is None


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
