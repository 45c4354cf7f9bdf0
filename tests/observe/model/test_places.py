"""Structure that is looked up together: whatever changes between two looks is seen by the second."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.training import batches, lora, next_token_loss
from torch import nn

from lora_probe_callbacks import LoraProbeMonitor
from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.observe.model.inventory import Inventory, Unit, take_inventory
from lora_probe_callbacks.observe.model.owners import Owners
from lora_probe_callbacks.observe.model.places import Places
from lora_probe_callbacks.observe.model.switches import Switches
from lora_probe_callbacks.observe.model.targets import Targets


def adapted() -> PeftModel:
    """Two adapted layers, two adapters."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["2"])
    model = get_peft_model(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), config)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0", "1"]))
    return model


def layer(model: PeftModel, index: int = 0) -> nn.Module:
    """One adapted layer."""
    return model.base_model.model[index]


def new_parameter(model: PeftModel) -> None:
    weight = layer(model).lora_A["default"].weight
    layer(model).lora_A["default"].weight = nn.Parameter(weight.detach().clone())


def new_module(model: PeftModel) -> None:
    layer(model).lora_B["default"] = nn.Linear(2, 4, bias=False)


def new_container(model: PeftModel) -> None:
    layer(model).lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})


def written_past_setattr(model: PeftModel) -> None:
    layer(model).lora_A["default"]._parameters["weight"] = nn.Parameter(torch.zeros(2, 4))


def removed(model: PeftModel) -> None:
    del layer(model, 1).lora_A["default"]


def emptied(model: PeftModel) -> None:
    layer(model).lora_A["default"].weight = None


@pytest.mark.parametrize("change", [new_parameter, new_module, new_container, written_past_setattr, removed, emptied])
def test_what_stands_at_a_place_is_what_the_model_holds_now(change: Callable[[PeftModel], None]) -> None:
    model = adapted()
    slots = [slot for unit in take_inventory([("", model)]).units for slot in unit.slots]
    places = Places(slot.place for slot in slots)
    before = places.tensors()
    assert all(t is slot.shown for t, slot in zip(before, slots, strict=True))
    change(model)
    after = places.tensors()
    assert [id(t) for t in after] == [id(slot.shown) for slot in slots]
    assert sum(now is not then for now, then in zip(after, before, strict=True)) in (1, 2)  # "second" has gone with it


def test_what_was_removed_and_comes_back_is_found_again() -> None:
    model = adapted()
    slots = [slot for unit in take_inventory([("", model)]).units for slot in unit.slots]
    places = Places(slot.place for slot in slots)
    kept = layer(model).lora_A
    layer(model).lora_A = nn.ModuleDict()
    assert sum(t is None for t in places.tensors()) == 2
    layer(model).lora_A = kept
    assert [id(t) for t in places.tensors()] == [id(slot.shown) for slot in slots]


def set_adapter(model: PeftModel) -> None:
    model.set_adapter("second")


def disabled(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def merged_in_one_layer(model: PeftModel) -> None:
    layer(model, 1).merge(adapter_names=["default"])


def list_changed_in_place(model: PeftModel) -> None:
    layer(model).merged_adapters.append("default")


def activated_in_place(model: PeftModel) -> None:
    layer(model, 1).set_adapter(["default", "second"])
    layer(model, 1)._active_adapter.remove("default")


def _layers(model: PeftModel) -> tuple[Inventory, list[Unit]]:
    inventory = take_inventory([("", model)])
    return inventory, inventory.units


@pytest.mark.parametrize(
    "change", [set_adapter, disabled, merged_in_one_layer, list_changed_in_place, activated_in_place]
)
def test_switches_are_those_of_the_moment(change: Callable[[PeftModel], None]) -> None:
    model = adapted()
    inventory, units = _layers(model)
    switches = Switches(inventory, units)
    before = switches.state()
    change(model)
    modes = tuple(unit.layer.mode(unit.adapter) for unit in units)
    assert tuple(map(switches.mode, range(len(units)))) == modes  # asked of a layer alone, before the next look
    assert switches.state() == (modes, inventory.active) != before
    assert switches.merged == any(x.merged for x in inventory.layers)


def owners_of(model: PeftModel, *optimizers: torch.optim.Optimizer) -> Owners:
    return Owners(Targets([("", model)], optimizers, ProbeConfig(adapter="default")))


def test_group_that_moves_to_another_optimizer_has_another_owner() -> None:
    model = adapted()
    first, second, *rest = [p for p in model.parameters() if p.requires_grad]
    one = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=0.1)
    two = torch.optim.SGD(rest, lr=0.1)
    owners = owners_of(model, one, two)
    before = owners.columns().owner.tolist()
    two.param_groups.insert(0, one.param_groups.pop())  # the same tensors, in the same order
    owners.look()
    assert before.count(0) == 2
    assert owners.columns().owner.tolist().count(0) == 1


def test_type_that_changes_under_the_same_object_is_seen() -> None:
    model = adapted()
    owners = owners_of(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    assert not owners.columns().half.any()
    held = owners.held(0)
    model.half()
    owners.look()
    assert owners.columns().half.all()
    assert owners.held(0) is not held


def test_whole_block_that_is_exchanged_is_found() -> None:
    """The layers of the new block are others, and nobody owns them; those of the former one stay where they were."""
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with LoraProbeMonitor(model, optimizer, every_n_steps=1, on_failure="stop", verbose=False) as probe:
        for step, batch in enumerate(batches(10)):
            next_token_loss(model, batch, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 3:
                layers = model.get_base_model().model.layers
                layers[0] = copy.deepcopy(layers[0])
    assert probe.report.status == "unhealthy"
    assert {f.code for f in probe.report.failures} == {"LP202"}, probe.report
