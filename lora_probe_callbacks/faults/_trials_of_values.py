"""One run for each fault of ``values``."""

from __future__ import annotations

from collections.abc import Callable

from peft import get_peft_model

from lora_probe_callbacks import faults
from lora_probe_callbacks.faults._models import (
    Normed,
    Trial,
    adamw,
    adapter_tensors,
    lora_config,
    lora_model,
    squares,
    with_second,
)

__all__ = ["TRIALS"]


def _average_left_in_place() -> Trial:
    model = lora_model()
    average = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}

    def validate(step: int) -> None:
        for name, tensor in model.named_parameters():
            if step and name in average:
                average[name].lerp_(tensor.detach(), 0.001)
        if step and step % 2 == 0:
            faults.average_left_in_place(model, average)

    return Trial(model, between=validate)


def _restarted_without_merging() -> Trial:
    model = lora_model()
    optimizer = adamw(model)

    def restart(step: int) -> None:
        if step and step % 2 == 0:
            faults.restarted_without_merging(model)
            for tensor in adapter_tensors(model):
                optimizer.state.pop(tensor, None)

    return Trial(model, optimizer, between=restart)


def _norms_left_in_training_mode() -> Trial:
    model = get_peft_model(Normed(), lora_config(target_modules=["first", "second"]))
    return Trial(model, loss=squares, between=lambda step: faults.norms_left_in_training_mode(model))


def _averaged_in_another_order() -> Trial:
    model = with_second("teacher")
    faults.trained_before(model)
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if ".teacher." in name:
            tensor.data = tensors[name.replace(".teacher.", ".default.")].data.clone()
    model.set_adapter("default")

    def between(step: int) -> None:
        if step:
            faults.averaged_in_another_order(model, "default", "teacher")

    return Trial(model, between=between, intent={"adapter": "default", "lagged_adapters": ("teacher",)})


TRIALS: dict[str, Callable[[], Trial]] = {
    make.__name__.removeprefix("_"): make
    for make in (
        _average_left_in_place,
        _restarted_without_merging,
        _norms_left_in_training_mode,
        _averaged_in_another_order,
    )
}
