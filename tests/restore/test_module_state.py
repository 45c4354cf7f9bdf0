"""What a forward may leave in the modules that it runs comes back as it was, object by object."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.training import config, lora
from torch import nn

from lora_probe_callbacks.restore.model import holding, own_gradients, untouched
from lora_probe_callbacks.restore.module_state import ActiveAdapters, module_state_restored
from lora_probe_callbacks.restore.tree import tree


class Samples:
    """An object of somebody's own, with a place in it."""

    def __init__(self) -> None:
        self.place = 0
        self.kept = [torch.zeros(2)]


class Leaving(nn.Module):
    """Leaves something in every kind of place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(3)
        self.calls = 0
        self.losses: list[torch.Tensor] = [torch.ones(1)]
        self.by_name = OrderedDict(first=torch.ones(1))
        self.seen = {1}
        self.samples = Samples()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.losses.append(x.sum())
        self.by_name.clear()
        self.seen.add(2)
        self.samples.place += 1
        self.samples.kept[0] = x
        self.new = x
        random.random()
        noise = torch.rand((), generator=self.generator) + torch.rand(())
        return self.inner(x) + noise


def everything(module: Leaving) -> list[Any]:
    return [
        module.calls,
        [id(t) for t in module.losses],
        list(module.by_name.items()),
        set(module.seen),
        module.samples.place,
        [id(t) for t in module.samples.kept],
        hasattr(module, "new"),
        random.getstate(),
        torch.get_rng_state().tolist(),
        module.generator.get_state().tolist(),
        [b.tolist() for b in module.buffers()],
    ]


def test_all_that_a_forward_leaves_comes_back() -> None:
    module = Leaving()
    before = everything(module)
    with module_state_restored(module):
        module(torch.randn(4, 3))
        changed = everything(module)
    assert everything(module) == before
    assert all(a != b for a, b in zip(changed, before, strict=True))


def test_buffer_that_was_exchanged_is_the_same_object_again() -> None:
    module = nn.BatchNorm1d(3)
    mean = module.running_mean
    with module_state_restored(module):
        module.running_mean = torch.ones(3)
    assert module.running_mean is mean


def test_state_comes_back_after_an_error() -> None:
    module = Leaving()
    before = everything(module)
    with pytest.raises(RuntimeError, match="running_mean"), module_state_restored(module):
        module(torch.randn(4, 2))
    assert everything(module) == before


def second(model: Any) -> None:
    model.set_adapter("second")


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def in_place(model: Any) -> None:
    for module in model.modules():
        active = vars(module).get("_active_adapter")
        if isinstance(active, list):
            active.append("second")


@pytest.mark.parametrize("switch", [second, disabled, in_place])
def test_active_adapters_come_back(switch: Callable[[Any], None]) -> None:
    model = lora()
    model.add_adapter("second", config())
    modules = list(model.modules())
    switches = ("active_adapter", "_active_adapter", "_disable_adapters")

    def state() -> list[str]:
        return [repr(vars(m).get(key, "-")) for m in modules for key in switches]

    before, flags = state(), [p.requires_grad for p in model.parameters()]
    with untouched(tree(model)):
        switch(model)
        assert state() != before
    assert state() == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_adapter_that_had_its_class_default_has_it_again() -> None:
    layer = next(m for m in lora().modules() if "_disable_adapters" in vars(m))
    vars(layer).pop("_disable_adapters")
    layer._active_adapter = ["default"]
    kept = ActiveAdapters([layer])
    layer._disable_adapters = True
    kept.put_back()
    assert "_disable_adapters" not in vars(layer)


def test_graph_that_was_built_before_outlives_other_values() -> None:
    weight = nn.Parameter(torch.randn(3))
    loss = (weight * weight).sum()
    own = weight.detach().clone()
    with holding([weight], [torch.zeros(3)]):
        assert not weight.any()
    loss.backward()
    assert torch.equal(weight, own)
    assert torch.equal(weight.grad, 2 * own)


def test_own_gradients_fire_no_hook_and_leave_the_former_gradient() -> None:
    weight = nn.Parameter(torch.ones(2))
    former = weight.grad = torch.full((2,), 5.0)
    fired: list[torch.Tensor] = []
    weight.register_post_accumulate_grad_hook(fired.append)
    weight.register_hook(fired.append)
    with own_gradients([weight]):
        (3 * weight).sum().backward()
        assert weight.grad.tolist() == [3.0, 3.0]
    assert weight.grad is former
    assert not fired
    weight.sum().backward()
    assert len(fired) == 2
