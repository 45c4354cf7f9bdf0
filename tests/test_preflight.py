"""One look before a long run: it finds what one step can show, and leaves everything as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from support.recipes import RECIPES, Recipe, parameters
from support.training import Training, adamw, batches, config, llama, lora, next_token_loss, trainable
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from lora_probe_callbacks import faults, preflight


def batch() -> dict[str, Tensor]:
    ids = batches(1)[0]
    return {"input_ids": ids, "labels": ids}


class Normed(nn.Module):
    """A model with batch norm, whose statistics every forward changes without counting a version."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.dropout(self.norm(self.first(x)), 0.1, self.training)).pow(2).mean()


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """All that a look could change, by value and by object."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False)["state"]["key"],
        "param_groups": [
            {k: v for k, v in g.items() if k != "params"} | {"ids": [id(p) for p in g["params"]]}
            for g in optimizer.param_groups
        ],
        "optimizer": {k: v for k, v in vars(optimizer).items() if isinstance(v, int | float | str)},
        "attributes": sorted(vars(optimizer)),
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = (id(tensor), tensor.requires_grad, id(tensor.grad), tensor.detach().clone())
        state[f"{name}.grad"] = None if tensor.grad is None else tensor.grad.clone()
    for tensor, values in optimizer.state.items():
        state[f"state of {id(tensor)}"] = {k: v.clone() if torch.is_tensor(v) else v for k, v in values.items()}
    for name, module in model.named_modules():
        state[f"{name} mode"] = module.training
        for kind, value in vars(module).items():
            if kind.endswith("_hooks"):
                state[f"{name}.{kind}"] = list(value)
        if isinstance(module, BaseTunerLayer):
            state[f"{name} adapters"] = (module.active_adapters, module.merged_adapters, module.disable_adapters)
    return state


def same(some: Any, other: Any) -> bool:
    if isinstance(some, Tensor):
        return isinstance(other, Tensor) and torch.equal(some, other)
    if isinstance(some, np.ndarray):
        return bool((some == other).all())
    if isinstance(some, dict):
        return some.keys() == other.keys() and all(same(some[k], other[k]) for k in some)
    if isinstance(some, list | tuple):
        return len(some) == len(other) and all(map(same, some, other))
    return bool(some == other)


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    assert not [key for key in before if not same(before[key], after[key])]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda m: AdamW(trainable(m), lr=1e-3),
    "sgd": lambda m: SGD(trainable(m), lr=0.1, momentum=0.9),
    "amsgrad-fused": lambda m: Adam(trainable(m), lr=1e-3, amsgrad=True, fused=True),
    "8-bit": lambda m: bitsandbytes.optim.AdamW8bit(trainable(m), lr=1e-3, min_8bit_size=16),
    "lbfgs": lambda m: LBFGS(trainable(m)),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("begun", [False, True])
def test_healthy_run_passes_and_everything_is_restored(kind: str, begun: bool) -> None:
    model = lora(lora_dropout=0.1)
    optimizer = OPTIMIZERS[kind](model)
    if begun:  # in the middle of a run: state, gradients, hooks of the user's
        for number, ids in enumerate(batches(2)):
            next_token_loss(model, ids, number).backward()
            optimizer.step(lambda: torch.zeros(())) if kind == "lbfgs" else optimizer.step()
        model.eval()
        model.get_base_model().lm_head.register_forward_hook(lambda *_: None)
    before = everything(model, optimizer)
    report = preflight(model, optimizer, batch())
    assert_unchanged(before, everything(model, optimizer))
    assert report.exit_code == (2 if kind == "lbfgs" else 0), str(report)
    assert not report.with_status("warn"), str(report)
    assert not report.internal_errors
    assert ("LBFGS steps by a closure" in str(report)) == (kind == "lbfgs")
    passed = {f.code for f in report.with_status("pass")}
    assert {"LP101", "LP103", "LP104", "LP201", "LP203", "LP301", "LP302", "LP501"} <= passed
    assert ("LP401" in passed) == (kind != "lbfgs"), "a step is judged where it can be taken back"


def test_batch_norm_and_a_hook_that_steps_in_the_backward_are_left_alone() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Normed(), config(target_modules=["first", "last"]))
    optimizer = adamw(model)
    stepped: list[str] = []
    for tensor in trainable(model):
        tensor.register_post_accumulate_grad_hook(lambda t: stepped.append("a step inside the backward"))
    before = everything(model, optimizer)
    report = preflight(model, optimizer, torch.randn(4, 12, generator=torch.Generator().manual_seed(0)))
    assert_unchanged(before, everything(model, optimizer))
    assert report.exit_code == 0, str(report)
    assert not stepped


@pytest.mark.parametrize(
    "arguments",
    [
        (batch(),),
        (tuple(batch().values()), lambda m, b: m(input_ids=b[0], labels=b[1]).loss),
        (batch()["input_ids"], lambda m, b: next_token_loss(m, b, 0)),
        (batch()["input_ids"], lambda m, b: m(input_ids=b, labels=b, return_dict=False)[0]),
    ],
    ids=["mapping", "tuple", "tensor", "output-is-a-tuple"],
)
def test_batch_and_loss_in_every_form(arguments: tuple[Any, ...]) -> None:
    model = lora()
    loss = dict(zip(["loss_fn"], arguments[1:], strict=False))
    assert preflight(model, adamw(model), arguments[0], **loss).exit_code == 0


def test_positional_batch_of_a_model_that_returns_its_loss() -> None:
    model = get_peft_model(Normed(), config(target_modules=["first"]))
    assert preflight(model, adamw(model), (torch.randn(4, 12),)).exit_code == 0


# A13 is a gradient left over from an earlier phase; the look begins without gradients. E11 warns at once, and fails in
# its fourth step: a batch without a label may be an accident.
AT_ONCE = [r for r in RECIPES if r.step == 0 and r.status == "fail" and r.name not in ("A13", "E11", "E11-no-decay")]


@pytest.mark.parametrize("recipe", parameters(AT_ONCE))
def test_fault_that_one_step_can_show_is_found(recipe: Recipe) -> None:
    run = recipe.build()
    optimizer = run.built_optimizer()
    run.between_steps(run, 0)
    before = everything(run.model, optimizer)
    report = preflight(run.model, optimizer, batches(1)[0], loss_fn=lambda m, b: run.loss(m, b, 0), **recipe.intent)
    assert [(f.code, f.step) for f in report.failures] == [(recipe.code, 0)], str(report)
    assert report.exit_code == 1
    assert_unchanged(before, everything(run.model, optimizer))


def test_gradient_that_is_not_finite_is_found() -> None:
    model = lora()
    report = preflight(
        model, adamw(model), batches(1)[0], loss_fn=lambda m, b: faults.overflowing(next_token_loss(m, b, 0))
    )
    assert [f.code for f in report.failures] == ["LP501"]


def test_what_takes_several_steps_is_pending() -> None:
    model = lora()
    report = preflight(model, adamw(model, lr=0.0), batch())
    assert report.exit_code == 2
    assert "learning rate of 0" in report.proofs["moved"].why
    assert {f.code: f.status for f in report.findings}["LP208"] == "pending"


def test_loud_fault_is_judged_and_not_raised() -> None:
    model = lora()
    faults.left_merged(model)
    report = preflight(model, adamw(model), batch())
    assert [f.code for f in report.failures] == ["LP103"]
    assert report.exit_code == 1


def test_error_of_the_users_that_has_nothing_to_do_with_the_adapter_is_raised() -> None:
    model = lora()
    optimizer = adamw(model)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="batch_size"):
        preflight(model, optimizer, {**batch(), "labels": batch()["labels"][:, :3]})
    assert_unchanged(before, everything(model, optimizer))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch": {"input_ids": batch()["input_ids"]}}, r"shapes \[\(2, 12, 64\)\], expected a scalar or a `loss`"),
        ({"model": llama()}, "found no PEFT adapter"),
        ({"adapter": "other"}, "expected names among"),
        ({"loss_fn": lambda m, b: m(**b).logits}, "loss_fn returned a tensor of shape"),
        ({"loss_fn": lambda m, b: 1.0}, "loss_fn returned float, expected a scalar tensor"),
    ],
    ids=["no labels", "no adapter", "name", "logits", "number"],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], words: str) -> None:
    model = arguments.get("model", lora())
    optimizer = AdamW([{"params": trainable(model)}])
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=words):
        preflight(**{"model": model, "optimizer": optimizer, "batch": batch(), **arguments})
    assert_unchanged(before, everything(model, optimizer))


def test_training_after_a_look_is_bit_equal_to_training_without() -> None:
    def trained(look: bool) -> list[Tensor]:
        run = Training(lora(lora_dropout=0.1))
        optimizer = run.built_optimizer()
        torch.manual_seed(3)
        for number, ids in enumerate(batches(4)):
            if look:
                preflight(run.model, optimizer, {"input_ids": ids, "labels": ids})
            next_token_loss(run.model, ids, number).backward()
            optimizer.step()
            optimizer.zero_grad()
        return trainable(run.model)

    assert all(map(torch.equal, trained(look=False), trained(look=True)))
