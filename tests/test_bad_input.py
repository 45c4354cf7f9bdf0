"""What cannot be meant is refused at construction or at train start, with what was got and what was expected."""

from __future__ import annotations

import pytest
import torch
from support.tiny import Task, fit, language_loss, llama, lora, peft_llama, token_batches
from torch import nn

from lora_probe_callbacks import (
    AdapterActivationCallback,
    GradientReachabilityCallback,
    LoraProbe,
    WrapperIdentityCallback,
)


@pytest.mark.parametrize(
    ("intent", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps got 0, expected an integer of at least 1"),
        ({"every_n_steps": -5}, "every_n_steps got -5, expected"),
        ({"every_n_steps": 2.0}, "every_n_steps got 2.0, expected"),
        ({"every_n_steps": True}, "every_n_steps got True, expected"),
        ({"every_n_steps": None}, "every_n_steps got None, expected"),
        ({"on_failure": "rise"}, "on_failure got 'rise', expected 'raise', 'stop' or 'warn'"),
        ({"on_failure": None}, "on_failure got None, expected"),
        ({"reference": "base"}, "reference got 'base', expected None or 'disabled'"),
        ({"select": ["LP9999"]}, "select got 'LP9999', expected a code"),
        ({"select": ["merged-adapter"]}, "select got 'merged-adapter', expected a code"),
        ({"select": [""]}, "select got '', expected a code"),
        ({"select": "LP1"}, "select got the string 'LP1', expected a sequence"),
        ({"ignore": ["LP103", "103"]}, "ignore got '103', expected a code"),
        ({"ignore": "LP103"}, "ignore got the string 'LP103', expected a sequence"),
        ({"reference_adapters": "ref"}, "reference_adapters got the string 'ref', expected a sequence"),
        ({"lagged_adapters": "ema"}, "lagged_adapters got the string 'ema', expected a sequence"),
        ({"frozen": "lora_A"}, "frozen got the string 'lora_A', expected a sequence"),
        ({"expect_targets": "lm_head"}, "expect_targets got the string 'lm_head', expected a sequence"),
        ({"new_token_ids": "12"}, "new_token_ids got the string '12', expected a sequence"),
        ({"adapter": ()}, r"adapter got \(\), expected"),
        ({"adapter": "a", "reference_adapters": ("a",)}, "expected to train and declared as reference"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_argument_that_cannot_be_meant(intent, message):
    with pytest.raises(ValueError, match=message):
        LoraProbe(**intent)


@pytest.mark.parametrize(
    "callback", [LoraProbe, AdapterActivationCallback, WrapperIdentityCallback, GradientReachabilityCallback]
)
def test_misspelt_argument(callback):
    with pytest.raises(TypeError, match="every_n_step"):
        callback(every_n_step=5)


def refused(task: Task, message: str, **intent: object) -> None:
    """Before the first step, and with nothing left behind."""
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    with pytest.raises(ValueError, match=message):
        fit(task, LoraProbe(verbose=False, **intent), token_batches(2))
    assert all(torch.equal(before[name], p) for name, p in task.named_parameters())
    assert not any(m._forward_pre_hooks for m in task.modules())


def test_no_adapter():
    refused(Task(llama(1)), r"found no PEFT adapter in the model \(Task\); expected a PeftModel")


def test_adapter_that_was_merged_and_unloaded_has_none_left():
    model = peft_llama().merge_and_unload()
    model.requires_grad_(True)
    refused(Task(model), "found no PEFT adapter.*merged and unloaded")


@pytest.mark.parametrize("argument", ["adapter", "reference_adapters", "lagged_adapters"])
def test_name_that_does_not_exist(argument):
    refused(
        Task(peft_llama()),
        rf"{argument} got \['polciy'\], expected names among \['default'\]",
        **{argument: ["polciy"]},
    )


def test_two_models_and_no_way_to_choose():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy, self.value = peft_llama(), peft_llama()
            self.head = nn.Linear(1, 1)

    task = Task(Two(), lambda task, ids, index: task.model.policy(input_ids=ids, labels=ids).loss)
    task.make_optimizers = lambda task: torch.optim.SGD(task.model.head.parameters(), lr=0.1)
    refused(task, r"found 2 models with adapters \(model.policy, model.value\), and the optimizers own tensors of none")


def test_two_models_are_told_apart_by_the_optimizer():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy, self.value = peft_llama(), peft_llama()

    task = Task(Two(), lambda task, ids, index: task.model.policy(input_ids=ids, labels=ids).loss)
    task.make_optimizers = lambda task: torch.optim.SGD(
        [p for p in task.model.policy.parameters() if p.requires_grad], lr=0.1
    )
    probe = LoraProbe(verbose=False)
    fit(task, probe, token_batches(6))
    assert probe.report.healthy is True
    assert not probe.report.with_status("fail", "warn")


def test_two_models_are_told_apart_by_the_adapters_name():
    from peft import get_peft_model

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = get_peft_model(llama(), lora(), adapter_name="policy")
            self.value = get_peft_model(llama(), lora(), adapter_name="value")

    step = lambda task, ids, index: task.model.policy(input_ids=ids, labels=ids).loss  # noqa: E731
    probe = LoraProbe(verbose=False, adapter="policy", reference_adapters=["value"])
    task = Task(Two(), step)
    task.make_optimizers = lambda task: torch.optim.SGD(
        [p for p in task.model.policy.parameters() if p.requires_grad], lr=0.1
    )
    for p in task.model.value.parameters():
        p.requires_grad_(False)
    fit(task, probe, token_batches(6))
    assert probe.report.healthy is True
    assert not probe.report.with_status("fail", "warn"), str(probe.report)


def test_refused_run_can_be_started_again():
    probe = LoraProbe(verbose=False)
    with pytest.raises(ValueError, match="found no PEFT adapter"):
        fit(Task(llama(1)), probe, token_batches(2))
    fit(Task(peft_llama(), language_loss), probe, token_batches(6))
    assert probe.report.healthy is True
