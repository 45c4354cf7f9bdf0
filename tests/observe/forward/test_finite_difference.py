"""LP307 and the metrics of the step response: what the update did to the loss, and what the gradient had said."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoHaConfig, get_peft_model
from support.doors import DOORS, arguments, autocast, fit_plain, new_scaler
from support.facts import NONE, bad, facts
from support.normalised import Normalised, normalised, vectors
from support.tiny import quantised_llama
from support.training import (
    Training,
    adamw,
    adapter_tensors,
    batches,
    config,
    llama,
    lora,
    next_token_loss,
    trainable,
    trained,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from lora_probe_callbacks import LoraProbeMonitor, LoraProbeTrainerCallback, preflight
from lora_probe_callbacks.checks.reachability.wrong_gradient import _why_not
from lora_probe_callbacks.facts import StepResponse
from lora_probe_callbacks.observe.forward import followed_backward
from lora_probe_callbacks.observe.forward.followed_backward import aliased

STEPS = 5


class Seen(NamedTuple):
    report: Any
    responses: tuple[StepResponse, ...]
    found: list[tuple[str, str, int]]


def seen(run: Training, steps: int = STEPS, *, fit: Callable[..., None] = fit_plain, **intent: Any) -> Seen:
    """Train in a plain loop and return what was measured in each step."""
    scaler = new_scaler(run)
    probe = LoraProbeMonitor(
        run.model, run.built_optimizer(), scaler=scaler, verbose=False, on_failure="stop", every_n_steps=1, **intent
    )
    fit(run, probe, steps, scaler)
    assert not probe.report.internal_errors, probe.report.internal_errors
    found = [(f.code, f.status, f.step) for f in probe.report.with_status("fail", "warn")]
    return Seen(probe.report, probe._session._collector.looks.responses, found)


def model(dtype: torch.dtype = torch.float32, dropout: float = 0.3, **changes: Any) -> nn.Module:
    made = lora(base=llama(dtype), lora_dropout=dropout, **changes)
    torch.manual_seed(0)
    trained(made)
    return made


def fresh(dtype: torch.dtype, dropout: float = 0.0, **changes: Any) -> nn.Module:
    """An adapter on all layers, its B zero, in the type of the model."""
    adapter = config(target_modules="all-linear", lora_dropout=dropout)
    return get_peft_model(llama(dtype, **changes), adapter, autocast_adapter_dtype=False)


def swallowing() -> nn.Module:
    """In 16 bits, with layers so wide that what a fresh adapter adds to them is next to nothing."""
    return fresh(torch.bfloat16, layers=4, hidden_size=128, initializer_range=0.1)


def checkpointed(**arguments: Any) -> nn.Module:
    made = model()
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    made.enable_input_require_grads()
    return made


def assert_right(result: Seen, *, low: float = 0.93, high: float = 1.05) -> None:
    """Measured in each step, quiet, and along the whole gradient within the band of healthy runs."""
    assert not result.found, result.found
    assert len(result.responses) >= 4  # in each step, until every tensor was measured
    for number, response in enumerate(result.responses):
        assert response.why_not is None, response
        assert number > 1 or low < response.central < high, response


# --- the fault ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.3, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_that_differs_from_the_forward_fails_at_the_second_step(dropout: float, dtype: torch.dtype) -> None:
    """D04: the same loss, and the gradient of another function."""
    wrong = model(dtype, dropout)
    wrong.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
    )
    result = seen(Training(wrong))
    assert result.found == [("LP307", "fail", 1)]
    assert all(0.1 < r.central < 0.85 for r in result.responses[:2])
    finding = result.report.failures[0]
    assert "finite difference over gradient 0." in finding.evidence["got"]
    assert "preserve_rng_state=True" in finding.fix


def test_backward_that_is_wrong_by_a_factor_fails() -> None:
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient / 2

    wrong = model(dropout=0.0)
    for layer in wrong.get_base_model().model.layers:
        project = layer.self_attn.o_proj
        project.forward = lambda x, forward=project.forward: Half.apply(forward(x))
    result = seen(Training(wrong))
    assert ("LP307", "fail", 1) in result.found
    assert result.responses[0].central > 1.15


def test_lora_of_multihead_attention_in_peft_is_wrong_by_a_factor() -> None:
    """huggingface/peft#3774, open: the forward holds the product of out_proj twice, its gradient once."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, None].repeat(1, 3, 1) * torch.tensor([1.0, 0.5, -1.0])[:, None]
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    wrong = get_peft_model(Attention(), config(target_modules=["attention"]))
    trained(wrong)
    assert seen(Training(wrong, vectors)).found == [("LP307", "fail", 1)]


# --- healthy ------------------------------------------------------------------------------------


def test_dropout_is_drawn_again() -> None:
    result = seen(Training(model()))
    assert_right(result, low=0.98, high=1.02)
    first, *others = result.responses
    assert abs(first.measured / first.predicted - 1) < 0.05
    assert not any(r.measured for r in others), "a forward more each"
    metrics = result.report.metrics
    ratio = metrics["lora_probe/step_response/measured"] / metrics["lora_probe/step_response/predicted"]
    assert metrics["lora_probe/step_response/ratio"] == pytest.approx(ratio)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    assert_right(seen(Training(checkpointed(use_reentrant=reentrant))), low=0.98, high=1.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    assert_right(seen(Training(model(dtype), precision="bf16-mixed" if dtype == torch.float32 else "32-true")))


def test_sixteen_bits_and_a_tiny_learning_rate() -> None:
    small = model(torch.bfloat16)
    for tensor in adapter_tensors(small).values():
        tensor.data = tensor.data.bfloat16()
    assert_right(seen(Training(small, optimizer=lambda m: adamw(m, lr=1e-6)), ignore=("LP401", "LP403")))


def test_losses_outside_the_model_and_inside() -> None:
    def outside(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        log_p = model(input_ids=batch).logits[:, :-1].log_softmax(-1)
        return -log_p.gather(-1, batch[:, 1:, None]).mean()

    def both(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        output = model(input_ids=batch, labels=batch)
        return output.loss + 0.1 * output.logits.square().mean()

    def of_a_tuple(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        loss, logits, *_ = model(input_ids=batch, labels=batch, return_dict=False)
        return loss + 0.1 * logits.square().mean()

    predicted = {}
    for loss in (next_token_loss, outside, both, of_a_tuple):
        result = seen(Training(model(), loss))
        assert_right(result, low=0.98, high=1.02)
        predicted[loss.__name__] = result.responses[0].predicted
    # Made inside or outside, it is the same loss.
    assert predicted["next_token_loss"] == pytest.approx(predicted["outside"], rel=1e-4)
    assert predicted["both"] == pytest.approx(predicted["of_a_tuple"], rel=1e-4)


def test_logits_changed_in_place_by_the_loss() -> None:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        logits = model(input_ids=batch).logits
        logits.div_(2.0)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    assert_right(seen(Training(model(), loss)))


def test_two_backwards_through_one_forward_add_up() -> None:
    def fit(run: Training, probe: Any, steps: int, scaler: Any) -> None:
        with probe:
            for batch in batches(steps):
                output = run.model(input_ids=batch, labels=batch)
                output.loss.backward(retain_graph=True)
                (0.5 * output.logits.square().mean()).backward()
                run.optimizer.step()
                run.optimizer.zero_grad()

    assert_right(seen(Training(model()), fit=fit), low=0.98, high=1.02)


def test_clipping_does_not_hide_the_gradient() -> None:
    def fit(run: Training, probe: Any, steps: int, scaler: Any) -> None:
        with probe:
            for batch in batches(steps):
                next_token_loss(run.model, batch, 0).backward()
                nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
                run.optimizer.step()
                run.optimizer.zero_grad()

    assert_right(seen(Training(model()), fit=fit), low=0.98, high=1.02)


def test_gradients_that_nobody_cleared_before_the_run() -> None:
    stale = model()
    next_token_loss(stale, batches(1)[0], 0).backward()
    result = seen(Training(stale), steps=1)
    assert 0.98 < result.responses[0].central < 1.02


def test_a_scaled_loss() -> None:
    result = seen(Training(model(), precision="16-mixed"), steps=8)
    assert not result.found
    measured = [r for r in result.responses if r.central is not None]
    assert measured
    assert all(0.9 < r.central < 1.1 for r in measured if r.noise < 0.02)
    # In the units of the loss, not of the scaler.
    assert all(r.change < 1 for r in measured)


def test_autocast_block_around_forward_backward_and_step() -> None:
    def fit(run: Training, probe: Any, steps: int, scaler: Any) -> None:
        with probe:
            for batch in batches(steps):
                with autocast("bf16-mixed"):
                    next_token_loss(run.model, batch, 0).backward()
                    run.optimizer.step()
                run.optimizer.zero_grad()

    assert_right(seen(Training(model()), fit=fit))


def test_one_autocast_block_around_all_steps_is_left_to_the_stale_forward() -> None:
    """G07: the gradient is not judged by a forward that does not see the parameters."""
    run = Training(lora(), optimizer=lambda m: SGD(trainable(m), lr=50.0), around=lambda: autocast("bf16-mixed"))
    assert seen(run).found == [("LP405", "fail", 1)]


def test_kink_is_no_wrong_gradient() -> None:
    """Ahead, the loss changes as the gradient says; behind, the ReLU has cut it off."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 4)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return nn.functional.relu(self.out(x) - shift + 1e-6)

    def loss(model: nn.Module, ids: Tensor, step: int) -> Tensor:
        x = ids[:, :4].float() / 64
        with torch.no_grad():
            shift = model.out(x)
        return model(x, shift).sum()

    result = seen(Training(get_peft_model(Shifted(), config(target_modules=["out"])), loss=loss))
    assert [0.4 < r.central < 0.6 for r in result.responses[:2]] == [True] * 2, result.responses
    assert not result.found, result.found
    reasons = {_why_not(r) for r in result.responses[:2]}
    assert all("no gradient fits both" in reason for reason in reasons)


def test_deep_model_far_from_linear_is_no_wrong_gradient() -> None:
    deep = lora(base=llama(layers=24, initializer_range=0.02), target_modules="all-linear")
    assert not seen(Training(deep, optimizer=lambda m: adamw(m, lr=1e-4))).found


def test_small_moves_that_sixteen_bits_swallow_are_no_wrong_gradient() -> None:
    """While B is about zero, every layer rounds back to what it was, and less comes out than the gradient says."""
    result = seen(Training(swallowing(), optimizer=lambda m: adamw(m, lr=1e-5)), ignore=("LP401", "LP403"))
    assert not result.found, result.found
    first, second = result.responses[:2]
    assert 0.6 < first.central < 0.8
    assert abs(first.own - 1) < 0.15
    assert "lost to rounding" in _why_not(first)
    assert 0.6 < second.central < 0.8
    assert second.own is None, "explained once, it is not asked again at once"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_recompute_of_a_fresh_adapter_is_told_from_what_rounding_swallows(dtype: torch.dtype) -> None:
    wrong = fresh(dtype, dropout=0.5)
    wrong.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
    )
    assert seen(Training(wrong), ignore=("LP403",)).found == [("LP307", "fail", 1)]


def test_dora_holds_a_norm_constant_by_design() -> None:
    result = seen(Training(lora(use_dora=True)))
    assert not result.found, result.found
    assert all("DoRA" in r.why_not for r in result.responses)


def test_other_tuners_approximate_by_design() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoHaConfig(r=4, target_modules=["0"]))
    result = seen(Training(model, loss=lambda m, ids, step: m(ids[:, :8].float()).square().mean()))
    assert not result.found, result.found
    assert all("no LoRA layer" in r.why_not for r in result.responses)


def test_batch_norm_and_a_generator_of_the_models_own() -> None:
    # Running statistics move, and no adapter file holds them: that is LP808's.
    assert_right(seen(Training(normalised(), vectors), ignore=["LP808"]), low=0.98, high=1.02)


# --- not valid, and why ---------------------------------------------------------------------------


def why_not(run: Training, **intent: Any) -> set[str | None]:
    result = seen(run, **{"ignore": ["LP808"], **intent})  # of running statistics, which no adapter file holds
    assert not result.found, result.found
    finding = next(f for f in result.report.findings if f.code == "LP307")
    assert finding.status == "skipped"
    return {r.why_not for r in result.responses}


def test_accumulation_is_measured_at_its_first_micro_batch() -> None:
    assert_right(seen(Training(model(), accumulate=4)), low=0.98, high=1.02)


def test_several_forwards_of_one_backward() -> None:
    """A policy on chosen and rejected answers, each in a forward of its own."""

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return next_token_loss(model, batch, step) - 0.5 * next_token_loss(model, batch.flip(1), step)

    assert_right(seen(Training(model(), loss)), low=0.98, high=1.02)
    assert_right(seen(Training(model(), loss, accumulate=2)), low=0.98, high=1.02)


def test_generation_cache_is_skipped() -> None:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        cache = DynamicCache()
        model(input_ids=batch[:, :4], past_key_values=cache, use_cache=True)
        return model(input_ids=batch[:, 4:], past_key_values=cache, labels=batch[:, 4:]).loss

    (reason,) = why_not(Training(model(), loss))
    assert "cache" in reason


def test_cache_that_the_model_makes_itself_is_no_hindrance() -> None:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return model(input_ids=batch, labels=batch, use_cache=True).loss

    assert_right(seen(Training(model(), loss)))


def test_arguments_changed_in_place_are_skipped() -> None:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        value = next_token_loss(model, batch, step)
        batch.fill_(1)
        return value

    (reason,) = why_not(Training(model(), loss))
    assert "changed in place" in reason


def test_hook_that_changes_a_gradient_is_skipped() -> None:
    masked = model()
    next(iter(adapter_tensors(masked).values())).register_hook(lambda g: g * 0.5)
    (reason,) = why_not(Training(masked))
    assert "a hook on a parameter" in reason


def test_penalty_on_the_weights_is_no_wrong_gradient() -> None:
    """It is in the gradient, and no output of the model shows it."""

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return next_token_loss(model, batch, step) + sum(p.square().sum() for p in adapter_tensors(model).values())

    result = seen(Training(model(), loss))
    assert not result.found
    first = result.responses[0]
    assert abs(first.central - 1) > 0.15
    assert abs(first.own - 1) < 0.02
    assert "a penalty on weights" in _why_not(first)


def test_model_that_is_not_repeatable_is_skipped() -> None:
    calls = []

    class Counting(Normalised):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x) * len(calls)

    torch.manual_seed(0)
    counting = get_peft_model(Counting(), config(target_modules=["inside"]))
    reasons = why_not(Training(counting, vectors))
    assert any("gave other outputs" in reason for reason in reasons if reason)


def test_4bit_model_in_eval_mode_is_never_run_again() -> None:
    class Linear4bit(nn.Linear):
        """Has the name that matters."""

    made = normalised()
    made.get_base_model().add_module("quantised", Linear4bit(2, 2).eval())

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        model.get_base_model().quantised.eval()
        return vectors(model, batch, step)

    (reason,) = why_not(Training(made, loss))
    assert "4-bit" in reason


# --- where people train -------------------------------------------------------------------------


def test_logits_too_large_to_keep_are_followed_from_the_input_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 152k: the gradient of the logits is not kept, and no logits are made again."""
    monkeypatch.setattr(followed_backward, "MOST_BYTES", 4096)

    def outside(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        log_p = model(input_ids=batch).logits[:, :-1].log_softmax(-1)
        return -log_p.gather(-1, batch[:, 1:, None]).mean()

    result = seen(Training(model(), outside))
    assert_right(result, low=0.98, high=1.02)
    made = model(target_modules=["q_proj", "lm_head"])
    result = seen(Training(made, outside), steps=20)
    assert_right(result, low=0.98, high=1.02)
    names = result.report.proofs["gradient"].missing
    assert names
    assert all("lm_head" in name for name in names), "the head's own adapter lies behind what was followed"
    assert_right(seen(Training(model())), low=0.98, high=1.02)  # nothing large receives a gradient here


def test_a_loss_that_is_scaled_in_place_as_the_trainer_does() -> None:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        value = model(input_ids=batch, labels=batch).loss
        value *= 2
        return value

    assert_right(seen(Training(model(), loss)), low=0.98, high=1.02)


def test_embeddings_made_outside() -> None:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        embedded = model.get_input_embeddings()(batch)
        return model(inputs_embeds=embedded, labels=batch).loss

    assert_right(seen(Training(model(), loss)), low=0.98, high=1.02)
    hooked = model()
    hooked.enable_input_require_grads()
    assert_right(seen(Training(hooked, loss)), low=0.98, high=1.02)


def test_two_parameters_over_one_storage() -> None:
    tied = model(dropout=0.0)
    first, second = tied.get_base_model().model.layers
    for name in ("lora_A", "lora_B"):
        former = getattr(first.self_attn.q_proj, name).default
        getattr(second.self_attn.q_proj, name).default.weight = nn.Parameter(former.weight.data)
    result = seen(Training(tied, optimizer=lambda m: SGD(trainable(m), lr=1e-2)), ignore=("LP401", "LP404"))
    assert all(abs(r.central - 1) < 0.02 for r in result.responses), result.responses


# --- a part is wrong ------------------------------------------------------------------------------


def test_wrong_gradient_in_two_of_many_tensors_is_seen() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return weight.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 2

    wrong = model(dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    layer = wrong.get_base_model().model.layers[1].self_attn.q_proj
    for part in (layer.lora_A.default, layer.lora_B.default):
        part.forward = lambda x, part=part: nn.functional.linear(x, Doubled.apply(part.weight))
    result = seen(Training(wrong), steps=20)
    assert [(code, status) for code, status, _ in result.found] == [("LP307", "fail")]
    assert result.found[0][2] < 20
    assert "layers.1.self_attn.q_proj.lora_" in result.report.failures[0].message
    assert "along that of" in result.report.failures[0].message


def test_gradient_of_exactly_zero_that_is_none() -> None:
    """linkedin/Liger-Kernel#1298: the head's gradient is multiplied by the weight of the first token, which is 0."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, zero: bool) -> Tensor:
            logits = hidden @ weight.T
            delta = logits.softmax(-1)
            delta[torch.arange(len(labels)), labels] -= 1
            ctx.save_for_backward(hidden, weight, delta)
            ctx.zero = zero
            return nn.functional.cross_entropy(logits, labels, reduction="none")

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            hidden, weight, delta = ctx.saved_tensors
            delta = delta * gradient[:, None]
            return delta @ weight, delta.T @ hidden * (not ctx.zero), None, None

    for zero in (False, True):
        made = model(dropout=0.0, modules_to_save=["lm_head"])
        base = made.get_base_model()

        def forward(input_ids: Tensor, base: Any = base, zero: bool = zero, **_: Any) -> Tensor:
            hidden = base.model(input_ids=input_ids)[0][:, :-1].reshape(-1, 32)
            weight = base.lm_head.modules_to_save["default"].weight
            return Loss.apply(hidden, weight, input_ids[:, 1:].reshape(-1), zero).mean()

        base.forward = forward
        result = seen(Training(made, lambda model, batch, step: model(batch)), steps=8)
        if not zero:
            assert not result.found
            continue
        ((code, status, step),) = result.found
        assert (code, status) == ("LP307", "fail")
        assert step <= 4
        assert "exactly zero, and the loss changes where they are moved" in result.report.failures[0].message
        assert "lm_head" in result.report.failures[0].message


class Dropping(torch.autograd.Function):
    """A loss of its own: the mean of -log p, whose backward may forget a part."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, wrong: bool) -> Tensor:
        log_p = logits.log_softmax(-1)
        ctx.save_for_backward(log_p, labels)
        ctx.wrong = wrong
        return -log_p.gather(-1, labels[..., None]).mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        log_p, labels = ctx.saved_tensors
        delta = log_p.exp() - nn.functional.one_hot(labels, log_p.shape[-1])
        if ctx.wrong:
            delta[..., ::2] = 0
        return gradient * delta / labels.numel(), None, None


@pytest.fixture
def nothing_compiled() -> None:
    """Other tests of this process compile: where somebody does, no loss is recorded."""
    counters.clear()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [True, False])
def test_backward_of_a_loss_outside_the_model(wrong: bool, dtype: torch.dtype) -> None:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        logits = model(input_ids=batch).logits[:, :-1].float()
        return Dropping.apply(logits, batch[:, 1:], wrong)

    result = seen(Training(model(dtype), loss))
    assert sum(r.outside is not None for r in result.responses) == 2
    if wrong:
        assert [(code, status) for code, status, _ in result.found] == [("LP307", "fail")]
        assert result.found[0][2] == 2
        assert "the loss is made outside the model, and its backward is wrong" in result.report.failures[0].message
    else:
        assert not result.found
        assert all(abs(r.outside) < 0.02 + 4 * r.outside_noise for r in result.responses if r.outside is not None)


@pytest.mark.usefixtures("nothing_compiled")
def test_what_a_loss_takes_for_a_constant_stays_one() -> None:
    """GRPO's ratio to itself, a weight made of the outputs, and an operation under no_grad."""

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        logits = model(input_ids=batch).logits[:, :-1]
        log_p = logits.log_softmax(-1).gather(-1, batch[:, 1:, None])[..., 0]
        with torch.no_grad():
            weight = logits.softmax(-1).amax(-1)
        ratio = (log_p - log_p.detach()).exp()
        value = -(ratio * weight).mean()
        value *= 2
        return value

    result = seen(Training(model(), loss))
    assert not result.found
    known = [r for r in result.responses if r.outside is not None]
    assert len(known) == 2
    assert all(abs(r.outside) < 0.01 for r in known)


@pytest.mark.usefixtures("nothing_compiled")
def test_a_loss_that_writes_into_the_loops_own_tensors_is_not_made_again() -> None:
    total = torch.zeros(())

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        value = model(input_ids=batch).logits.square().mean()
        total.add_(value.detach())
        with torch.no_grad():
            total.add_(value)
        return value

    result = seen(Training(model(), loss))
    assert not result.found
    assert all(r.outside is None for r in result.responses)
    assert not torch.overrides._get_current_function_mode_stack()


# --- no trace -----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [model, lambda: checkpointed(use_reentrant=True), normalised, swallowing])
def test_training_is_bit_equal(build: Callable[[], nn.Module]) -> None:
    def train(probe: Any) -> list[Any]:
        run = Training(build(), vectors if isinstance(build().get_base_model(), Normalised) else next_token_loss)
        torch.manual_seed(3)
        optimizer = run.built_optimizer()
        made = probe(run.model, optimizer)
        fit_plain(run, made, 8)
        if made is not None and hasattr(made, "_session"):
            assert any(r.central is not None for r in made._session._collector.looks.responses)
        state = copy.deepcopy([run.model.state_dict(), optimizer.state_dict()["state"]])
        return [*state, torch.get_rng_state()]

    without = train(lambda *_: contextlib.nullcontext())
    watched = train(
        lambda model, optimizer: LoraProbeMonitor(model, optimizer, verbose=False, every_n_steps=1, ignore=("LP403",))
    )
    for a, b in zip(without, watched, strict=True):
        flat_a, flat_b = (torch.utils._pytree.tree_leaves(x) for x in (a, b))
        assert len(flat_a) == len(flat_b)
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(flat_a, flat_b, strict=True))


def test_objects_that_modules_keep_are_left_as_they_are() -> None:
    """A buffer of samples with a place in it, as MonteCLoRA has one."""

    class Samples:
        def __init__(self) -> None:
            self.place, self.drawn = 0, []

        def draw(self) -> float:
            self.place += 1
            self.drawn.append(self.place)
            return 0.001 * self.place

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.samples = nn.Linear(4, 4), Samples()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x) + self.samples.draw()

    base = Noisy()
    run = Training(
        get_peft_model(base, config(target_modules=["out"])),
        loss=lambda model, ids, step: model(ids[:, :4].float() / 64).square().sum(),
    )
    seen(run, steps=6)
    assert base.samples.place == 6
    assert base.samples.drawn == [1, 2, 3, 4, 5, 6]


def test_no_hook_and_no_tensor_is_left() -> None:
    watched = model()
    optimizer = adamw(watched)
    with LoraProbeMonitor(watched, optimizer, verbose=False) as probe:
        next_token_loss(watched, batches(1)[0], 0).backward()
        assert any(p._backward_hooks for p in watched.parameters())
    assert not any(p._backward_hooks for p in watched.parameters())
    assert probe._session._reruns._backward is None


def test_preflight_measures_it_too() -> None:
    watched = model()
    report = preflight(watched, adamw(watched), {"input_ids": batches(1)[0], "labels": batches(1)[0]})
    assert 0.9 < report.metrics["lora_probe/step_response/ratio"] < 1.1


# --- an operation without a backward --------------------------------------------------------------


def packs() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


@pytest.mark.skipif(not packs(), reason="bitsandbytes packs 4-bit weights for inference only on CPUs with AVX512-BF16")
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit:UserWarning")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["q and v", "all"])
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non-reentrant"])
def test_weights_packed_for_inference_by_an_evaluation(checkpointing: str, targets: Any, tmp_path: Path) -> None:
    """With LoRA everywhere no gradient is None, and along it the loss changes as it says: LP307 is blind to it."""
    if checkpointing == "none":
        prepare: dict[str, Any] = {"use_gradient_checkpointing": False}
    else:
        prepare = {"gradient_checkpointing_kwargs": {"use_reentrant": checkpointing == "reentrant"}}
    made = get_peft_model(quantised_llama(tmp_path, **prepare), config(target_modules=targets))
    trained(made)

    def evaluated_at_the_second_step(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        if step == 1:
            model.eval()
            with torch.no_grad():
                model(input_ids=batch % 32)
            model.train()
        return next_token_loss(model, batch % 32, step)

    result = seen(Training(made, evaluated_at_the_second_step))
    assert result.found == [("LP308", "fail", 1)]
    finding = result.report.failures[0]
    assert "packed for inference" in finding.message
    assert "model.state_dict()" in finding.fix
    made.state_dict()  # the fix
    assert not seen(Training(made, lambda m, b, step: next_token_loss(m, b % 32, step))).found


def test_four_bits_in_train_mode_are_healthy(tmp_path: Path) -> None:
    made = get_peft_model(quantised_llama(tmp_path, use_gradient_checkpointing=False), config())
    trained(made)

    def evaluated_without_dropout(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            model(input_ids=batch % 32)
        return next_token_loss(model, batch % 32, step)

    result = seen(Training(made, evaluated_without_dropout))
    assert_right(result, low=0.9, high=1.1)
    assert "LP301" in {f.code for f in result.report.with_status("pass")}


@pytest.fixture(scope="module")
def kernel() -> Iterator[Callable[[Tensor], Tensor]]:
    """An operator as a kernel library registers it: for a device, and without a backward."""
    library = torch.library.Library("lora_probe_tests", "FRAGMENT")
    library.define("doubled(Tensor x) -> Tensor")
    library.impl("doubled", lambda x: x.detach() * 2, "CPU")
    yield torch.ops.lora_probe_tests.doubled
    library._destroy()


@pytest.mark.filterwarnings("ignore:lora_probe_tests..doubled:UserWarning")
@pytest.mark.parametrize(("part", "found"), [("o_proj", [("LP308", "warn", 0)]), ("lm_head", [])])
def test_operator_without_a_backward_warns_if_an_adapter_lies_behind_it(kernel: Any, part: str, found: Any) -> None:
    made = model(dropout=0.0)
    layer = next(m for n, m in made.named_modules() if n.endswith(part))
    made.enable_input_require_grads()
    # Where the input of the operator carries no graph, no gradient is dropped.
    layer.forward = lambda x, forward=layer.forward: (
        forward(kernel(x)) if part == "o_proj" else forward(x + 0 * kernel(x.detach()))
    )
    result = seen(Training(made))
    assert [f for f in result.found if f[0] == "LP308"] == found
    if found:
        assert "4 adapter tensors lie behind" in result.report.with_status("warn")[-1].message
    else:
        assert "LP308" in {f.code for f in result.report.with_status("pass")}


# --- aliases ------------------------------------------------------------------------------------


def test_aliases_keep_containers_and_identities() -> None:
    x = torch.ones(2, requires_grad=True)
    h, y = x * 2, x * 3
    made: dict[int, Tensor] = {}
    output = {"h": h, "all": [h, y], "pair": (y, 1), "constant": torch.ones(1), "none": None}
    assert aliased(output, made) is output
    assert output["h"] is output["all"][0] is made[id(h)]
    assert output["h"] is not h
    assert output["pair"] == (made[id(y)], 1)
    assert output["h"].data_ptr() == h.data_ptr()
    (output["h"] + output["all"][1]).sum().backward()
    assert x.grad.tolist() == [5.0, 5.0]


HALF = {"packed": (3, 7), "forwards": (dataclasses.replace(facts().forwards[0], why_unknown="a checkpoint"),)}


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({"packed": (3, 7)}, []),  # the first layer's, whose input needs no gradient: the graph knows
        (HALF, []),
        (HALF | {"packed": (7, 7)}, ["LP308"]),
        ({"forwards": (dataclasses.replace(facts().forwards[0], dropped=frozenset({0})),)}, ["LP308"]),
        # No gradient arrives because of it.
        (HALF | {"packed": (7, 7), "gradients": (NONE,) * 4}, ["LP308"]),
    ],
)
def test_dropped_gradients_are_one_finding(changes: dict[str, Any], codes: list[str]) -> None:
    assert list(bad(facts(**changes))) == codes


def test_checkpointed_block_in_a_users_own_model() -> None:
    """A recompute in a model that is not from transformers."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.drop, self.out = nn.Linear(8, 256), nn.Dropout(0.5), nn.Linear(256, 1)
            self.keeps = True

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(
                lambda x: self.drop(self.inside(x).relu()), x, use_reentrant=False, preserve_rng_state=self.keeps
            )
            return self.out(h)

    for keeps in (True, False):
        torch.manual_seed(0)
        made = get_peft_model(Block(), config(target_modules=["inside"], r=8))
        trained(made, std=0.3)
        made.get_base_model().keeps = keeps
        found = seen(Training(made, vectors, optimizer=lambda m: adamw(m, lr=1e-2))).found
        assert [code for code, _, _ in found] == ([] if keeps else ["LP307"])


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("door", DOORS)
def test_every_door_measures_with_its_defaults(door: str, accumulate: int) -> None:
    probe, fit = DOORS[door](Training(model(), accumulate=accumulate), STEPS, verbose=False, every_n_steps=1)
    fit()
    assert_right(Seen(probe.report, probe._session._collector.looks.responses, []), low=0.98, high=1.02)
    assert probe.report.proofs["gradient"].proven >= 3
    assert probe.report.status == "healthy"


def test_a_trainer_that_makes_the_loss_itself(tmp_path: Path) -> None:
    """Nothing overridden: the loss is taken out of the outputs, divided, and scaled in place."""
    from transformers import Trainer

    rows = [{"input_ids": row, "labels": row} for batch in batches(12) for row in batch]
    probe = LoraProbeTrainerCallback(verbose=False, every_n_steps=1)
    Trainer(
        model=model(),
        args=arguments(str(tmp_path), STEPS, accumulate=2, per_device_train_batch_size=2),
        train_dataset=rows,
        callbacks=[probe],
    ).train()
    assert_right(Seen(probe.report, probe._session._collector.looks.responses, []), low=0.98, high=1.02)
