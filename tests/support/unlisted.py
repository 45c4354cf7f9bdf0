"""Faults that no list holds, of the same mechanisms: what a check observes, not what it recognises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft import IA3Config, get_peft_model
from peft.tuners.lora import LoraLayer
from support.recipes import TWICE, Recipe, from_step, recipe
from support.training import Training, adamw, adapter_tensors, config, llama, lora, next_token_loss, trainable, trained
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lora_probe_callbacks import faults

UNLISTED: list[Recipe] = []
unlisted = partial(recipe, into=UNLISTED)


def layers(model: nn.Module) -> Any:
    """The decoder layers under whatever wraps them."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


# --- state --------------------------------------------------------------------------------------


@unlisted(
    "native add_adapter activates the newest", "LP101", 0, "'first'", "['second']", adapter="first", warnings=TWICE
)
def newest_active() -> Training:
    model = llama()
    model.add_adapter(config(), "first")
    model.add_adapter(config(), "second")
    return Training(model)


@unlisted("disabled in one block only", "LP106", 0, "2 of its 4 layers", "disabled in 2")
def one_block_disabled() -> Training:
    model = lora()
    for projection in (layers(model)[0].self_attn.q_proj, layers(model)[0].self_attn.v_proj):
        projection.enable_adapters(False)
    for tensor in adapter_tensors(model).values():
        tensor.requires_grad_(True)
    return Training(model)


@unlisted("modules_to_save alone disabled", "LP106", 0, "4 of its 5 layers", "disabled in 1")
def copy_disabled() -> Training:
    model = lora(modules_to_save=["lm_head"])
    optimizer = adamw(model)
    model.get_base_model().lm_head.enable_adapters(False)
    return Training(model, optimizer=optimizer)


@unlisted("merged for one micro-batch of four", "LP103", 1, "merged")
def one_micro_batch_merged() -> Training:
    def between(run: Training, batch: int) -> None:
        if batch == 5:
            run.model.merge_adapter()
        elif batch == 6:
            run.model.unmerge_adapter()

    return Training(lora(hook=True), between_steps=between, accumulate=4)


@unlisted("DoRA merged", "LP103", 0, "merged")
def dora_merged() -> Training:
    model = lora(hook=True, use_dora=True)
    model.merge_adapter()
    return Training(model)


@unlisted("IA3 merged", "LP103", 0, "merged")
def ia3_merged() -> Training:
    model = get_peft_model(llama(), IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]))
    model.enable_input_require_grads()
    model.merge_adapter()
    return Training(model)


@unlisted("unloaded in training", "LP103", 3, "without a single adapter tensor")
def unloaded_at_3() -> Training:
    return Training(lora(hook=True), between_steps=from_step(3, lambda run: run.model.merge_and_unload()))


@unlisted("one adapted layer exchanged for its base layer", "LP202", 3, "2 adapter tensors", "left the model")
def layer_exchanged() -> Training:
    def change(run: Training) -> None:
        attention = layers(run.model)[0].self_attn
        attention.q_proj = attention.q_proj.base_layer

    return Training(lora(), between_steps=from_step(3, change))


@unlisted("disabled by a generator that nobody ended", "LP102", 2, "all adapters were disabled")
def disabled_by_a_generator() -> Training:
    model = lora(hook=True)

    def scores() -> Iterator[Tensor]:
        with model.disable_adapter():
            while True:
                yield torch.zeros(1)

    reference = scores()  # alive as long as the run, as in a data pipeline
    run = Training(model, optimizer=adamw(model))
    run.between_steps = from_step(2, lambda run: next(reference) and None)
    return run


@unlisted("no adapter active", "LP101", 2, "'default' was not active", "[] was")
def none_active() -> Training:
    model = lora(hook=True)
    return Training(
        model,
        optimizer=adamw(model),
        between_steps=from_step(2, lambda run: run.model.base_model.set_adapter([])),
    )


@unlisted("reward adapter left active by the loss", "LP105", 3, "switched between the forward and its backward")
def reward_adapter_left() -> Training:
    model = lora(hook=True)
    model.add_adapter("reward", config())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = AdamW(list(adapter_tensors(model, "default").values()), lr=1e-3)

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        value = next_token_loss(model, batch, step)
        if step == 3:
            model.set_adapter("reward")
        return value

    return Training(model.train(), loss, optimizer=optimizer)


# --- identity -----------------------------------------------------------------------------------


@unlisted("deepcopy trained", "LP202", 0, "8 tensors that the model does not hold")
def copy_trained() -> Training:
    model = lora()
    return Training(copy.deepcopy(model), optimizer=adamw(model))


@unlisted("deepcopy called", "LP209", 1, "another model's")
def copy_called() -> Training:
    model = lora()
    other = copy.deepcopy(model)
    return Training(model, lambda model, batch, step: next_token_loss(other, batch, step))


class TwoModels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.owned, self.called = lora(), lora()


@unlisted("second PeftModel called", "LP209", 0, "the loss was made by", "called")
def second_model_called() -> Training:
    model = TwoModels()
    optimizer = adamw(model.owned)
    return Training(model, lambda model, batch, step: next_token_loss(model.called, batch, step), optimizer=optimizer)


@unlisted("optimizer from before the adapter, with a head that trains", "LP201", 0, "8 of 8")
def param_group_forgotten() -> Training:
    base = llama()
    base.requires_grad_(False)
    base.lm_head.requires_grad_(True)
    optimizer = AdamW(list(base.parameters()), lr=1e-3)
    model = lora(base=base)
    model.get_base_model().lm_head.requires_grad_(True)
    return Training(model, optimizer=optimizer)


@unlisted("two active adapters, one in the optimizer", "LP201", 0, "8 of 16", ".b.")
def one_of_two_owned() -> Training:
    model = lora()
    optimizer = adamw(model)
    model.add_adapter("b", config())
    model.base_model.set_adapter(["default", "b"])
    return Training(model, optimizer=optimizer)


@unlisted("reference trained along", "LP207", 0, "'ref'", "trainable", adapter="default", reference_adapters=("ref",))
def reference_trained_along() -> Training:
    model = lora()
    model.add_adapter("ref", config())
    model.base_model.set_adapter(["default", "ref"])
    return Training(model)


@unlisted("assigned before training", "LP202", 0, "8 tensors that the model does not hold")
def assigned_before() -> Training:
    model = lora()
    optimizer = adamw(model)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for tensor in adapter_tensors(model).values():
        tensor.requires_grad_(True)
    return Training(model, optimizer=optimizer)


@unlisted("lower block frozen", "LP203", 0, "4 of 8", "layers.0", status="warn")
def lower_block_frozen() -> Training:
    model = lora()
    layers(model)[0].requires_grad_(False)
    return Training(model)


@unlisted("rate 0 for the adapter's group alone", "LP208", 3, "learning rate is exactly 0")
def group_at_zero() -> Training:
    base = llama()
    model = lora(base=base)
    base.lm_head.requires_grad_(True)
    groups = [{"params": list(adapter_tensors(model).values())}, {"params": list(base.lm_head.parameters())}]
    optimizer = AdamW(groups, lr=1e-3)
    return Training(model, optimizer=optimizer, scheduler=lambda o: LambdaLR(o, [lambda step: 0.0, lambda step: 1.0]))


@unlisted("rate 0 for B alone", "LP208", 3, "lora_B", status="warn")
def b_at_zero() -> Training:
    model = lora()
    trained(model)
    a = [p for n, p in adapter_tensors(model).items() if "lora_A" in n]
    b = [p for n, p in adapter_tensors(model).items() if "lora_B" in n]
    return Training(model, optimizer=AdamW([{"params": a}, {"params": b, "lr": 0.0}], lr=1e-3))


@unlisted("B left out of the optimizer", "LP201", 0, "4 of 8", "lora_B")
def b_left_out() -> Training:
    model = lora()
    return Training(model, optimizer=AdamW([p for n, p in adapter_tensors(model).items() if "lora_A" in n], lr=1e-3))


@unlisted("matrices alone in the optimizer", "LP201", 0, "4 of 12", "lora_magnitude_vector")
def magnitude_left_out() -> Training:
    model = lora(use_dora=True)
    return Training(model, optimizer=AdamW([p for p in trainable(model) if p.ndim == 2], lr=1e-3))


@unlisted("parameters overwritten by a conversion", "LP202", 0, "copies of 8 of its adapter tensors", "copies none")
def overwritten_by_conversion() -> Training:
    model = lora(base=llama(torch.bfloat16))
    optimizer = adamw(model)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    return Training(model, optimizer=optimizer)


@unlisted("groups filled with casts", "LP202", 0, "copies of 8 of its adapter tensors", "copies none")
def groups_filled_with_casts() -> Training:
    model = lora()
    optimizer = adamw(model)
    for group in optimizer.param_groups:
        group["params"] = [p.detach().double().requires_grad_() for p in group["params"]]
    return Training(model, optimizer=optimizer)


@unlisted("weight norm on A after the optimizer", "LP202", 0, "4 tensors that the model does not hold", "lora_A")
def parametrized_afterwards() -> Training:
    model = lora()
    optimizer = adamw(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            torch.nn.utils.parametrizations.weight_norm(module.lora_A["default"])
    return Training(model, optimizer=optimizer)


# --- reachability -------------------------------------------------------------------------------


@unlisted("loss rebuilt from its value", "LP301", 0, "does not depend", "no gradient arrived")
def loss_rebuilt() -> Training:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return torch.tensor(next_token_loss(model, batch, step).item(), requires_grad=True)

    return Training(lora(), loss)


@unlisted("called with detached tensors", "LP301", 0, "does not depend on any of the 8")
def functional_with_detached() -> Training:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        detached = {name: p.detach() for name, p in model.named_parameters()}
        return torch.func.functional_call(model, detached, (), {"input_ids": batch, "labels": batch}).loss

    return Training(lora(hook=True), loss)


@unlisted("called with clones from before", "LP301", 0, "does not depend on any of the 8")
def functional_with_clones() -> Training:
    model = lora(hook=True)
    clones = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return torch.func.functional_call(model, clones, (), {"input_ids": batch, "labels": batch}).loss

    return Training(model, loss)


@unlisted("output of B detached by a hook", "LP301", 0, "does not depend on any of the 8")
def b_detached() -> Training:
    model = lora(hook=True)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_B["default"].register_forward_hook(lambda module, args, output: output.detach())
    return Training(model)


@unlisted("lower block in inference mode", "LP302", 3, "4 adapter tensors", "layers.0", "without gradients enabled")
def lower_block_in_inference_mode() -> Training:
    model = lora(hook=True)
    block = layers(model)[0]
    forward = block.forward

    def without(*args: Any, **kwargs: Any) -> Tensor:
        with torch.inference_mode():
            output = forward(*args, **kwargs)
        return output.clone()

    block.forward = without
    return Training(model)


def headed(head: nn.Module) -> Callable[[nn.Module, Tensor, int], Tensor]:
    """A loss that calls a head by a reference from before the adapter was attached."""

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        hidden = model.get_base_model().model(input_ids=batch)[0]
        return F.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    return loss


@unlisted("head taken before its adapter", "LP104", 1, "lm_head", "never called")
def head_taken_before_its_adapter() -> Training:
    base = llama()
    loss = headed(base.lm_head)
    return Training(lora(base=base, target_modules=["q_proj", "lm_head"]), loss)


@unlisted("head taken before its copy", "LP104", 1, "lm_head", "never called")
def head_taken_before_its_copy() -> Training:
    base = llama()
    loss = headed(base.lm_head)
    return Training(lora(base=base, modules_to_save=["lm_head"]), loss)


@unlisted("outputs rounded to a grid", "LP303", 3, "every adapter gradient is exactly zero")
def rounded_to_a_grid() -> Training:
    model = lora()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.register_forward_hook(lambda module, args, output: (output * 64).round() / 64)
    return Training(model, optimizer=adamw(model, weight_decay=0.0))


@unlisted("detach in the middle", "LP301", 3, "4 adapter tensors", "layers.0")
def detached_in_the_middle() -> Training:
    model = lora()
    layers(model)[0].register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    return Training(model)


@unlisted("lower half under no_grad", "LP302", 3, "4 adapter tensors", "layers.0", "without gradients enabled")
def lower_half_without_grad() -> Training:
    model = lora()
    block = layers(model)[0]
    block.forward = torch.no_grad()(block.forward)
    return Training(model)


@unlisted(
    "whole forward under no_grad, beside a penalty",
    "LP302",
    15,
    "8 adapter tensors",
    "no_grad",
    status="warn",
    steps=20,
)
def forward_without_grad() -> Training:
    base = llama()
    model = lora(base=base)
    base.lm_head.requires_grad_(True)

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            value = next_token_loss(model, batch, step)
        return value + 1e-3 * base.lm_head.weight.pow(2).sum()

    return Training(model, loss)


@unlisted("features cached once", "LP104", 100, "never called", status="warn", steps=102)
def features_cached() -> Training:
    cache: dict[str, Tensor] = {}

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        base = model.get_base_model()
        if not cache:
            with torch.no_grad():
                cache["hidden"] = base.model(input_ids=batch)[0]
        logits = base.lm_head(cache["hidden"])
        return F.cross_entropy(logits.flatten(0, 1), batch.flatten())

    return Training(lora(target_modules=["q_proj", "lm_head"]), loss)


@unlisted("embedding read past its adapter", "LP104", 100, "embed_tokens", "never called", status="warn", steps=102)
def embedding_bypassed() -> Training:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        embeddings = F.embedding(batch, model.get_base_model().model.embed_tokens.weight)
        return model(inputs_embeds=embeddings, labels=batch).loss

    return Training(lora(target_modules=["q_proj", "embed_tokens"]), loss)


@unlisted("a hook zeroes every gradient", "LP303", 3, "every adapter gradient is exactly zero")
def gradients_zeroed() -> Training:
    model = lora()
    for tensor in adapter_tensors(model).values():
        tensor.register_hook(torch.zeros_like)
    return Training(model, optimizer=adamw(model, weight_decay=0.0))


@unlisted("dropout of 1", "LP303", 3, "every adapter gradient is exactly zero")
def all_dropped() -> Training:
    model = lora(lora_dropout=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0
    return Training(model.train(), optimizer=adamw(model, weight_decay=0.0))


# --- update -------------------------------------------------------------------------------------


@unlisted("values put back after every step", "LP401", 3, "put back")
def put_back() -> Training:
    model = lora()
    values = {n: p.detach().clone() for n, p in adapter_tensors(model).items()}

    def restore(run: Training, step: int) -> None:
        with torch.no_grad():
            for name, tensor in adapter_tensors(run.model).items():
                tensor.copy_(values[name])

    return Training(model, between_steps=restore)


@unlisted("B initialised anew before every step", "LP401", 3, "put back")
def b_reset() -> Training:
    def reset(run: Training, step: int) -> None:
        with torch.no_grad():
            for name, tensor in adapter_tensors(run.model).items():
                if "lora_B" in name:
                    tensor.zero_()

    return Training(lora(), between_steps=reset)


@unlisted("rate below the precision of float32", "LP401", 3, "no step has moved the adapter")
def rate_below_precision() -> Training:
    model = lora()
    trained(model)
    return Training(model, optimizer=adamw(model, lr=1e-14, weight_decay=0.0))


@unlisted("storage exchanged for that of the start", "LP401", 3, "put back")
def storage_exchanged() -> Training:
    model = lora()
    start = {n: p.detach().clone() for n, p in adapter_tensors(model).items()}

    def exchange(run: Training, step: int) -> None:
        for name, tensor in adapter_tensors(run.model).items():
            tensor.data = start[name].clone()

    return Training(model, between_steps=exchange)


@unlisted("everything initialised anew in training", "LP404", 3, "base weight", "drifted")
def initialised_at_3() -> Training:
    def change(run: Training) -> None:
        with torch.no_grad():
            for tensor in run.model.parameters():
                tensor.normal_(std=0.02)

    return Training(lora(), between_steps=from_step(3, change))


@unlisted("NaN loss once", "LP501", 2, "inf or nan")
def nan_once() -> Training:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        value = next_token_loss(model, batch, step)
        return value * float("nan") if step == 2 else value

    return Training(lora(), loss)


@unlisted("NaN in the adapter from the start", "LP501", 0, "inf or nan")
def nan_from_the_start() -> Training:
    model = lora()
    with torch.no_grad():
        next(iter(adapter_tensors(model).values())).fill_(float("nan"))
    return Training(model)


@unlisted("float16 adapter", "LP403", 3, "lost to rounding")
def float16_adapter() -> Training:
    model = lora()
    for tensor in adapter_tensors(model).values():
        tensor.data = tensor.data.half()
    return Training(model, optimizer=torch.optim.SGD(trainable(model), lr=1e-5))


@unlisted("base weight overwritten in training", "LP404", 2, "base weight", "drifted")
def base_overwritten() -> Training:
    def change(run: Training) -> None:
        with torch.no_grad():
            for name, tensor in run.model.named_parameters():
                if "base_layer" in name:
                    tensor.mul_(0.9)

    return Training(lora(), between_steps=from_step(2, change))


__all__ = ["UNLISTED", "faults"]
