"""Update directions: what a step does, who owns it, and that trying it leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from support.projection_cases import Case, language_case, language_loss, relative_error, tokens
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lora_probe_callbacks.estimators import UpdateDirection, per_prompt_projection

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw_amsgrad_capturable_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), amsgrad=True, foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "bnb_adamw_8bit": lambda p: bnb.optim.AdamW8bit(p, lr=0.1, min_8bit_size=16),
    "bnb_lion_8bit": lambda p: bnb.optim.Lion8bit(p, lr=0.1, min_8bit_size=16),
}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def training_case(optimizer: str, steps: int = 0) -> tuple[Case, Optimizer]:
    """A model with gradients at hand, after some real steps."""
    case = language_case(dtype=torch.float32, target_modules=["q_proj", "down_proj"], r=4)
    made = OPTIMIZERS[optimizer](trained(case.model).values())
    for _ in range(steps):
        case.loss_fn(case.model).sum().backward()
        made.step()
        made.zero_grad()
    case.loss_fn(case.model).sum().backward()
    return case, made


def contents(value: Any) -> Any:
    """A value with all that it holds, tensors as bytes: equal means bit-equal."""
    if isinstance(value, torch.Tensor):
        gradient = value.grad if value.is_leaf else None
        data = value.detach().contiguous().flatten().view(torch.uint8).tolist() if value.numel() else []
        return id(value), value.dtype, tuple(value.shape), data, value._version, contents(gradient)
    if isinstance(value, dict):
        return id(value), [(id(k) if isinstance(k, torch.Tensor) else k, contents(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [contents(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | None) else id(value)


def test_the_8_bit_optimizers_do_keep_8_bit_states() -> None:
    case, optimizer = training_case("bnb_adamw_8bit", steps=1)
    states = {optimizer.state[p]["state1"].dtype for p in trained(case.model).values()}
    assert states == {torch.uint8}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
class TestFromOptimizerStep:
    def test_it_is_bit_equal_to_the_step_that_follows(self, name: str, steps: int) -> None:
        case, optimizer = training_case(name, steps)
        direction = UpdateDirection.from_optimizer_step(case.model, optimizer)
        before = {n: p.detach().clone() for n, p in trained(case.model).items()}
        optimizer.step()
        assert direction.scale == 1
        assert direction.tensors.keys() == before.keys()
        assert direction.norm() > 0
        for n, p in trained(case.model).items():
            assert torch.equal(direction.tensors[n], p.detach() - before[n]), n

    def test_it_leaves_no_trace(self, name: str, steps: int) -> None:
        case, optimizer = training_case(name, steps)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        fired = []
        optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
        optimizer.register_step_post_hook(lambda *_: fired.append("post"))
        everywhere = register_optimizer_step_post_hook(lambda *_: fired.append("global"))
        state = torch.get_rng_state()
        before = contents(vars(optimizer)), contents(list(case.model.parameters()))
        UpdateDirection.from_optimizer_step(case.model, optimizer)
        assert (contents(vars(optimizer)), contents(list(case.model.parameters()))) == before
        assert torch.equal(torch.get_rng_state(), state)
        assert fired == []
        optimizer.step()
        scheduler.step()
        everywhere.remove()
        assert fired == ["pre", "post", "global"]

    def test_training_goes_on_as_if_it_had_not_been_tried(self, name: str, steps: int) -> None:
        runs = []
        for tried in (False, True):
            case, optimizer = training_case(name, steps)
            for _ in range(3):
                if tried:
                    UpdateDirection.from_optimizer_step(case.model, optimizer)
                optimizer.step()
                optimizer.zero_grad()
                case.loss_fn(case.model).sum().backward()
            runs.append([p.detach().clone() for p in trained(case.model).values()])
        assert all(torch.equal(plain, probed) for plain, probed in zip(*runs, strict=True))


def test_a_failing_step_is_taken_back_too() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            self.state["new"] = {"key": 1}
            raise OverflowError

    case, _ = training_case("sgd_momentum")
    optimizer = Failing(trained(case.model).values(), lr=0.1, momentum=0.9)
    before = contents(vars(optimizer))
    with pytest.raises(OverflowError):
        UpdateDirection.from_optimizer_step(case.model, optimizer)
    assert contents(vars(optimizer)) == before


def test_a_graph_that_waits_for_its_backward_survives() -> None:
    case, optimizer = training_case("adamw")
    parameters = list(trained(case.model).values())
    expected = torch.autograd.grad(case.loss_fn(case.model).sum(), parameters)
    waiting = case.loss_fn(case.model).sum()
    UpdateDirection.from_optimizer_step(case.model, optimizer)
    found = torch.autograd.grad(waiting, parameters)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_an_optimizer_that_owns_more_than_the_model_is_restored_as_a_whole() -> None:
    case, _ = training_case("adamw")
    head = nn.Parameter(torch.ones(3))
    head.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([*trained(case.model).values(), head], lr=0.1)
    direction = UpdateDirection.from_optimizer_step(case.model, optimizer)
    assert direction.tensors.keys() == trained(case.model).keys()
    assert torch.equal(head, torch.ones(3))
    assert optimizer.state == {}


def test_accelerates_optimizer_is_unwrapped() -> None:
    case, optimizer = training_case("adamw")
    wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer)
    assert wrapped is not optimizer
    direction = UpdateDirection.from_optimizer_step(case.model, wrapped)
    assert direction.cosine(UpdateDirection.from_optimizer_step(case.model, optimizer)) == pytest.approx(1)


class TestOptimizerStepRefuses:
    def test_a_closure(self) -> None:
        case, _ = training_case("adamw")
        optimizer = torch.optim.LBFGS(trained(case.model).values())
        with pytest.raises(ValueError, match=r"got LBFGS, whose step\(\) needs a closure"):
            UpdateDirection.from_optimizer_step(case.model, optimizer)

    def test_gradients_with_a_graph(self) -> None:
        case, optimizer = training_case("adamw")
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the reference cycle
            case.loss_fn(case.model).sum().backward(create_graph=True)
        with pytest.raises(ValueError, match="carries a graph"):
            UpdateDirection.from_optimizer_step(case.model, optimizer)
        optimizer.zero_grad()

    def test_a_running_backward(self) -> None:
        case, optimizer = training_case("adamw")
        loss = case.loss_fn(case.model).sum()
        loss.register_hook(lambda g: UpdateDirection.from_optimizer_step(case.model, optimizer) and None)
        with pytest.raises(ValueError, match="a backward is running"):
            loss.backward()

    def test_missing_gradients(self) -> None:
        case, optimizer = training_case("adamw")
        optimizer.zero_grad()
        with pytest.raises(ValueError, match="got no gradients"):
            UpdateDirection.from_optimizer_step(case.model, optimizer)

    def test_the_optimizer_of_another_module(self) -> None:
        case, _ = training_case("adamw")
        _, other = training_case("adamw")
        with pytest.raises(ValueError, match="AdamW owns none of the trainable tensors of PeftModelForCausalLM"):
            UpdateDirection.from_optimizer_step(case.model, other)


class TestGradients:
    def test_from_gradients_descends(self) -> None:
        case, _ = training_case("adamw")
        direction = UpdateDirection.from_gradients(case.model, lr=0.5)
        assert direction.scale == -0.5
        for name, p in trained(case.model).items():
            assert torch.equal(direction.tensors[name], p.grad)
            assert direction.tensors[name].data_ptr() != p.grad.data_ptr()

    def test_from_gradients_without_any(self) -> None:
        case = language_case()
        with pytest.raises(ValueError, match="got no gradient on any trainable parameter of PeftModel"):
            UpdateDirection.from_gradients(case.model, lr=0.1)

    def test_from_loss_is_the_mean_over_prompts_of_all_micro_batches(self) -> None:
        case = language_case()
        parts = [language_loss(tokens(3)), language_loss(tokens(1, seed=7))]
        direction = UpdateDirection.from_loss(case.model, parts, lr=0.5)
        parameters = trained(case.model)
        total = sum(loss_fn(case.model).sum() for loss_fn in parts) / 4
        expected = torch.autograd.grad(total, list(parameters.values()))
        assert direction.scale == 0.5
        assert all(p.grad is None for p in parameters.values())
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(direction.tensors[name], gradient, rtol=1e-6, atol=1e-9)

    def test_from_loss_keeps_the_gradients_that_are_there(self) -> None:
        case, _ = training_case("adamw")
        before = {name: (p.grad, p.grad.clone()) for name, p in trained(case.model).items()}
        UpdateDirection.from_loss(case.model, case.loss_fn, lr=0.1)
        for name, p in trained(case.model).items():
            assert p.grad is before[name][0]
            assert torch.equal(p.grad, before[name][1])

    @pytest.mark.parametrize("loss_fns", [[], torch.no_grad()(language_loss(tokens()))], ids=["none", "no_grad"])
    def test_from_loss_without_a_gradient(self, loss_fns: Any) -> None:
        case = language_case()
        with pytest.raises(ValueError, match=r"no gradient|no trainable parameter"):
            UpdateDirection.from_loss(case.model, loss_fns, lr=0.1)


class TestAdam:
    @pytest.mark.parametrize("steps", [0, 3])
    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_it_is_the_step_of_adam_without_momentum(self, amsgrad: bool, steps: int) -> None:
        """With beta_1 = 0 the real step is -lr g / (sqrt(v_hat) + eps)."""
        case, _ = training_case("adamw")
        parameters = trained(case.model).values()
        optimizer = torch.optim.Adam(parameters, lr=0.01, betas=(0.0, 0.9), eps=1e-3, amsgrad=amsgrad)
        for _ in range(steps):
            optimizer.step()
            optimizer.zero_grad()
            case.loss_fn(case.model).sum().backward()
        step = UpdateDirection.from_optimizer_step(case.model, optimizer)
        gradient = UpdateDirection.from_gradients(case.model, lr=0.01)
        direction = UpdateDirection.adam_preconditioned(gradient, case.model, optimizer)
        assert direction.scale == -0.01
        for name, mu in direction.tensors.items():
            torch.testing.assert_close(direction.scale * mu, step.tensors[name], rtol=1e-3, atol=1e-7)

    def test_a_surrogate_is_ascended(self) -> None:
        case, optimizer = training_case("adamw", steps=2)
        gradient = UpdateDirection.from_loss(case.model, case.loss_fn, lr=0.3)
        assert UpdateDirection.adam_preconditioned(gradient, case.model, optimizer).scale == 0.1

    def test_groups_of_different_rates(self) -> None:
        case, _ = training_case("adamw")
        A, B = ([p for n, p in trained(case.model).items() if part in n] for part in ("lora_A", "lora_B"))
        groups = [{"params": A, "lr": 0.01}, {"params": B, "lr": 0.16}]
        optimizer = torch.optim.AdamW(groups, betas=(0.0, 0.9), weight_decay=0.0)
        step = UpdateDirection.from_optimizer_step(case.model, optimizer)
        gradient = UpdateDirection.from_gradients(case.model, lr=1.0)
        direction = UpdateDirection.adam_preconditioned(gradient, case.model, optimizer)
        assert direction.scale == -0.16
        assert direction.cosine(step) == pytest.approx(-1, abs=1e-6)
        assert 0.16 * direction.norm() == pytest.approx(step.norm(), rel=1e-3)

    def test_other_optimizers_are_refused(self) -> None:
        case, optimizer = training_case("bnb_adamw_8bit")
        gradient = UpdateDirection.from_gradients(case.model, lr=0.1)
        with pytest.raises(TypeError, match=r"got AdamW8bit.*from_optimizer_step"):
            UpdateDirection.adam_preconditioned(gradient, case.model, optimizer)

    def test_tensors_that_the_optimizer_does_not_own_are_refused(self) -> None:
        case, _ = training_case("adamw")
        optimizer = torch.optim.AdamW(list(trained(case.model).values())[1:])
        gradient = UpdateDirection.from_gradients(case.model, lr=0.1)
        with pytest.raises(ValueError, match=r"does not own .*lora_A.* \(and 0 more"):
            UpdateDirection.adam_preconditioned(gradient, case.model, optimizer)


class TestLastStep:
    def test_it_is_the_difference(self) -> None:
        case, optimizer = training_case("adamw")
        expected = UpdateDirection.from_optimizer_step(case.model, optimizer)
        before = {name: p.detach().clone() for name, p in trained(case.model).items()}
        optimizer.step()
        direction = UpdateDirection.from_last_step(case.model, before)
        assert direction.scale == 1
        assert all(torch.equal(mu, expected.tensors[name]) for name, mu in direction.tensors.items())

    def test_bfloat16_steps_are_read_exactly(self) -> None:
        model = nn.Linear(1, 1, bias=False).bfloat16()
        with torch.no_grad():
            model.weight.fill_(256.0)
        before = {"weight": model.weight.detach().clone()}
        with torch.no_grad():
            model.weight.fill_(1.0078125)
        assert UpdateDirection.from_last_step(model, before).tensors["weight"].item() == 1.0078125 - 256

    def test_references_instead_of_copies_are_refused(self) -> None:
        model = nn.Linear(2, 1)
        with pytest.raises(ValueError, match=r"before\['weight'\] is the parameter itself.*clone"):
            UpdateDirection.from_last_step(model, {"weight": model.weight.detach()})


class TestOwners:
    def direction(self, model: nn.Module, **tensors: torch.Tensor) -> UpdateDirection:
        tensors = tensors or {name: torch.ones_like(p) for name, p in model.named_parameters()}
        return UpdateDirection(tensors, scale=1.0, source="from_last_step", model=model)

    def test_they_are_found_under_other_names(self) -> None:
        model = nn.Linear(2, 1)
        direction = self.direction(model)
        owners = direction.owned_by(nn.Sequential(nn.Tanh(), model))
        assert owners["weight"] is model.weight

    @pytest.mark.parametrize("how", ["copy", "replaced", "gone"])
    def test_a_module_with_other_tensors_is_refused(self, how: str) -> None:
        model: nn.Linear | None = nn.Linear(2, 1)
        assert model is not None
        made_on = rf"Linear at {id(model):#x}"
        direction = self.direction(model)
        target = copy.deepcopy(model)
        fate = "another object"
        if how == "replaced":
            model.weight, target = nn.Parameter(model.weight.detach().clone()), model
            gc.collect()
            # Which of the two depends on whether something else still holds the former tensor.
            fate = "(which no longer exists|another object)"
        if how == "gone":
            model = None
            gc.collect()
            fate = "which no longer exists"
        there = rf"Linear at {id(target):#x} owns a tensor of the same name"
        match = rf"made on 'weight' of {made_on}, {fate}; {there}"
        with pytest.raises(ValueError, match=match):
            direction.owned_by(target)

    def test_they_are_projected_on_through_a_wrapper(self) -> None:
        case = language_case()
        direction = UpdateDirection.from_loss(case.model, case.loss_fn, lr=0.1)
        wrapper = nn.ModuleDict({"policy": case.model})
        s = per_prompt_projection(wrapper, lambda m: case.loss_fn(m["policy"]), direction)
        expected = per_prompt_projection(case.model, case.loss_fn, direction, backend="loop")
        assert relative_error(s, expected) < 1e-10

    def test_a_direction_knows_when_its_parameters_have_changed(self) -> None:
        model = nn.Linear(2, 1)
        direction = self.direction(model)
        assert not direction.stale
        with torch.no_grad():
            model.weight.add_(1.0)
        assert direction.stale

    def test_it_keeps_no_model_alive(self) -> None:
        model = nn.Linear(2, 1)
        direction = self.direction(model)
        del model
        gc.collect()
        assert direction.stale
        assert direction.norm() == pytest.approx(math.sqrt(3))

    def test_what_cannot_be_a_step_is_refused(self) -> None:
        model = nn.Linear(2, 1)
        with pytest.raises(ValueError, match=r"NaN or infinity in weight \(and 0 more of 1 tensors\)"):
            self.direction(model, weight=torch.tensor([[torch.inf, 0.0]]))
        with pytest.raises(ValueError, match=r"weight got shape \(1,\), expected \(1, 2\) as in Linear"):
            self.direction(model, weight=torch.ones(1))
        with pytest.raises(ValueError, match="got 'w', expected a parameter of Linear"):
            self.direction(model, w=torch.ones(1))
        with pytest.raises(ValueError, match="got scale nan"):
            UpdateDirection({"bias": torch.ones(1)}, scale=math.nan, source="from_loss", model=model)


class TestAlgebra:
    def test_dot_norm_and_cosine(self) -> None:
        model = nn.Linear(2, 1)
        made = TestOwners().direction
        mu = made(model, weight=torch.tensor([[3.0, 0.0]]), bias=torch.tensor([4.0]))
        nu = made(model, weight=torch.tensor([[1.0, 7.0]]))
        assert mu.norm() == 5
        assert mu.dot(nu) == nu.dot(mu) == 3
        assert mu.cosine(nu) == pytest.approx(3 / 5 / math.sqrt(50))
        assert math.isnan(mu.cosine(made(model, weight=torch.zeros(1, 2))))
        assert "norm=5, scale=1, from_last_step on Linear" in repr(mu)

    def test_directions_that_share_nothing_are_refused(self) -> None:
        model, made = nn.Linear(2, 1), TestOwners().direction
        with pytest.raises(ValueError, match="share no tensor: got 'weight' and 'bias'"):
            made(model, weight=torch.ones(1, 2)).dot(made(model, bias=torch.ones(1)))
        with pytest.raises(ValueError, match="expected one"):
            made(model).dot(made(nn.Linear(3, 1)))


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        case = language_case()
        direction = UpdateDirection.from_loss(case.model, case.loss_fn, lr=0.1)
        direction.save(tmp_path / "mu.safetensors")
        restarted = language_case().model
        loaded = UpdateDirection.load(tmp_path / "mu.safetensors", restarted)
        assert (loaded.scale, loaded.source, loaded.made_at) == (0.1, "from_loss", direction.made_at)
        assert all(torch.equal(loaded.tensors[name], mu) for name, mu in direction.tensors.items())
        s = per_prompt_projection(restarted, case.loss_fn, loaded)
        assert relative_error(s, per_prompt_projection(case.model, case.loss_fn, direction)) < 1e-12

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        save_file({"weight": torch.ones(1, 2)}, tmp_path / "adapter.safetensors")
        with pytest.raises(ValueError, match="holds no update direction"):
            UpdateDirection.load(tmp_path / "adapter.safetensors", nn.Linear(2, 1))
