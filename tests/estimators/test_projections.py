"""What a projection returns, and what it leaves behind."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.projection_cases import (
    conv_case,
    language_case,
    language_loss,
    random_direction,
    relative_error,
    tokens,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_probe_callbacks.estimators import (
    UpdateDirection,
    per_prompt_projection,
    project_batches,
    verify_projection,
)

bounded = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """GPT-2, which computes in float64 throughout: others cast to float32 on the way."""
    return language_case("gpt2").model


@bounded
@given(examples=st.integers(1, 5), length=st.integers(2, 9), seed=st.integers(0, 99))
def test_permuting_the_prompts_permutes_s(model: nn.Module, examples: int, length: int, seed: int) -> None:
    ids = tokens(examples, length, seed)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    direction = random_direction(model, seed=seed)
    s, permuted = (per_prompt_projection(model, language_loss(i), direction) for i in (ids, ids[order]))
    torch.testing.assert_close(permuted, s[order], rtol=0, atol=1e-12 * float(s.abs().max()))


@bounded
@given(a=st.floats(-3, 3), b=st.floats(-3, 3), seed=st.integers(0, 99))
def test_s_is_linear_in_the_direction(model: nn.Module, a: float, b: float, seed: int) -> None:
    loss_fn = language_loss(tokens(3, 6, seed))
    mu, nu = random_direction(model, seed=seed), random_direction(model, seed=seed + 100)
    both = {name: a * mu[name] + b * nu[name] for name in mu}
    s_mu, s_nu, s_both = (per_prompt_projection(model, loss_fn, direction) for direction in (mu, nu, both))
    scale = float((s_mu.abs() + s_nu.abs()).max())
    torch.testing.assert_close(s_both, a * s_mu + b * s_nu, rtol=0, atol=1e-12 * scale)


@bounded
@given(examples=st.integers(1, 5), responses=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_sum_of_s_is_the_product_with_the_summed_gradient(
    model: nn.Module, examples: int, responses: int, seed: int
) -> None:
    loss_fn = language_loss(tokens(examples * responses, 6, seed), responses)
    mu = random_direction(model, seed=seed)
    rows = torch.arange(examples).repeat_interleave(responses)
    s = per_prompt_projection(model, loss_fn, mu, example_of_row=rows)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss_fn(model).sum(), list(parameters.values()))
    product = sum((g * mu[name]).sum() for name, g in zip(parameters, gradients, strict=True))
    assert s.shape == (examples,)
    torch.testing.assert_close(s.sum(), product, rtol=0, atol=1e-12 * float(s.abs().sum()))


def test_backends_and_finite_difference_agree() -> None:
    case = language_case()
    direction = UpdateDirection.from_loss(case.model, case.loss_fn, lr=0.1)
    comparison = verify_projection(case.model, case.loss_fn, direction)
    alpha = per_prompt_projection(case.model, case.loss_fn, direction, backend="alpha")
    assert comparison.error_to_loop < 1e-10
    assert comparison.error_to_finite_difference < 1e-3
    assert relative_error(comparison.finite_difference, comparison.loop) < 1e-3
    assert relative_error(alpha, comparison.loop) < 1e-6


def test_verification_reports_a_wrong_projection() -> None:
    case = conv_case()
    images = torch.randn(4, 2, 9, 9, dtype=torch.float64)

    def coupled(model: nn.Module) -> torch.Tensor:
        logits = model(images)
        return (logits @ logits.T).logsumexp(-1)

    comparison = verify_projection(case.model, coupled, random_direction(case.model))
    assert comparison.error_to_loop > 0.01
    assert relative_error(comparison.finite_difference, comparison.loop) < 1e-3


def test_verification_restores_parameters_and_a_graph_that_waits() -> None:
    case = language_case()
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    waiting = case.loss_fn(case.model).sum()
    verify_projection(case.model, case.loss_fn, random_direction(case.model))
    assert all(torch.equal(p, before[name]) for name, p in case.model.named_parameters())
    waiting.backward()  # the version counters are as before, too


def test_alpha_runs_with_sdpa_restricted_to_the_differentiable_kernel() -> None:
    case = language_case(attention="sdpa")
    direction = random_direction(case.model)
    with sdpa_kernel(SDPBackend.MATH):
        alpha = per_prompt_projection(case.model, case.loss_fn, direction, backend="alpha")
    assert relative_error(alpha, per_prompt_projection(case.model, case.loss_fn, direction)) < 1e-6


@pytest.mark.parametrize("backend", ["doubled_rank", "loop", "alpha"])
def test_all_backends_draw_the_masks_that_the_next_forward_draws(backend: Any) -> None:
    case = language_case(lora_dropout=0.5)
    direction = random_direction(case.model)
    torch.manual_seed(5)
    s = per_prompt_projection(case.model, case.loss_fn, direction, backend=backend)
    parameters = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(case.loss_fn(case.model).sum(), list(parameters.values()))
    product = sum((g * direction[name]).sum() for name, g in zip(parameters, gradients, strict=True))
    torch.testing.assert_close(s.sum(), product, rtol=1e-6, atol=1e-7 * float(s.abs().sum()))


def test_batches_are_projected_one_after_another(model: nn.Module) -> None:
    batches = [tokens(4, 6, seed=1), tokens(2, 8, seed=2)]
    direction = random_direction(model)
    s = project_batches(
        model,
        lambda model, ids: language_loss(ids, responses=2)(model),
        batches,
        direction,
        example_of_row=lambda ids: torch.arange(len(ids) // 2).repeat_interleave(2),
    )
    expected = [
        per_prompt_projection(model, language_loss(ids, responses=2), direction, backend="loop") for ids in batches
    ]
    assert s.shape == (3,)
    assert relative_error(s, torch.cat(expected)) < 1e-10
    with pytest.raises(ValueError, match="got no batches"):
        project_batches(model, lambda model, ids: ids, [], direction)


def test_a_direction_that_moves_nothing_gives_zero(model: nn.Module) -> None:
    zero = {name: torch.zeros_like(mu) for name, mu in random_direction(model).items()}
    assert per_prompt_projection(model, language_loss(tokens()), zero).tolist() == [0.0] * 4


def test_the_layers_of_an_idle_adapter_need_not_run_if_they_do_not_move() -> None:
    case = language_case()
    direction = random_direction(case.model)
    for name, mu in direction.items():
        if "layers.1" in name:
            mu.zero_()
    for name, module in case.model.named_modules():
        if name.endswith("layers.1"):
            module.forward = lambda hidden, *_, **__: hidden
    s = per_prompt_projection(case.model, case.loss_fn, direction)
    assert relative_error(s, per_prompt_projection(case.model, case.loss_fn, direction, backend="loop")) < 1e-10


def test_the_tensors_of_a_direction_may_have_any_type(model: nn.Module) -> None:
    dtypes = itertools.cycle([torch.float64, torch.float32, torch.bfloat16, torch.int32])
    mixed = {name: (3 * mu).to(next(dtypes)) for name, mu in random_direction(model).items()}
    loss_fn = language_loss(tokens())
    s = per_prompt_projection(model, loss_fn, mixed)
    expected = per_prompt_projection(model, loss_fn, {name: mu.double() for name, mu in mixed.items()})
    assert relative_error(s, expected) < 1e-12


def test_no_graph_around_the_call_is_needed(model: nn.Module) -> None:
    direction, loss_fn = random_direction(model), language_loss(tokens())
    with torch.no_grad():
        s = per_prompt_projection(model, loss_fn, direction)
    torch.testing.assert_close(s, per_prompt_projection(model, loss_fn, direction))
    assert not s.requires_grad


def observed(model: nn.Module) -> dict[str, Any]:
    """Everything that a projection might leave behind, in values that compare."""
    peft: Any = model
    return {
        "gradients": {
            n: None if p.grad is None else (id(p.grad), p.grad.tolist()) for n, p in model.named_parameters()
        },
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "versions": {name: p._version for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "active": (
            peft.active_adapters,
            [
                (n, m.active_adapters, m.disable_adapters)
                for n, m in model.named_modules()
                if hasattr(m, "_disable_adapters")
            ],
        ),
        "hooks": {
            name: [len(getattr(module, hooks)) for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            for name, module in model.named_modules()
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("backend", ["doubled_rank", "loop", "alpha"])
def test_no_trace_is_left(backend: Any, fails: bool) -> None:
    case = conv_case(batch_norm=True, lora_dropout=0.3)
    model: Any = case.model
    model.add_adapter("idle", model.peft_config["default"])
    model.double()
    case.loss_fn(model).sum().backward()
    model.eval()
    model.base_model.model.second.train()
    fired = []
    watched = next(p for p in model.parameters() if p.requires_grad)
    watched.register_hook(lambda g: fired.append("hook"))
    watched.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated"))

    def loss_fn(model: Any) -> torch.Tensor:
        random.random(), np.random.rand(), torch.rand(3)
        L = case.loss_fn(model)
        if fails:
            model.train()
            model.base_model.set_adapter("idle")
            model.base_model.disable_adapter_layers()
            model.base_model.model.norm.running_mean.add_(1.0)
            raise KeyError("in loss_fn")
        return L

    direction = random_direction(model)
    before = observed(model)
    if fails:
        with pytest.raises(KeyError, match="in loss_fn"):
            per_prompt_projection(model, loss_fn, direction, backend=backend)
    else:
        per_prompt_projection(model, loss_fn, direction, backend=backend, self_check="always")
    after = observed(model)
    for what, value in before.items():
        assert after[what] == value, what
    assert fired == []


def test_batch_statistics_are_restored_after_the_loop() -> None:
    case = conv_case(batch_norm=True)
    before = {name: buffer.clone() for name, buffer in case.model.named_buffers()}
    per_prompt_projection(case.model, case.loss_fn, random_direction(case.model), backend="loop")
    assert all(torch.equal(buffer, before[name]) for name, buffer in case.model.named_buffers())
    case.loss_fn(case.model)
    assert any(not torch.equal(buffer, before[name]) for name, buffer in case.model.named_buffers())


def test_a_leaf_outside_the_model_gets_no_gradient(model: nn.Module) -> None:
    head = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss_fn = language_loss(tokens())
    per_prompt_projection(model, lambda m: head * loss_fn(m), random_direction(model))
    assert head.grad is None
