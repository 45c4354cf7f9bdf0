"""One run for each fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.optim import SGD, AdamW

from lora_probe_callbacks import faults
from lora_probe_callbacks.faults import Fault
from lora_probe_callbacks.faults._models import (
    LENGTH,
    VOCABULARY,
    Block,
    Holder,
    Towers,
    Trial,
    adamw,
    adapter_tensors,
    against_disabled,
    at_step,
    hooked,
    lora_config,
    lora_model,
    next_token_loss,
    preference,
    squares,
    tiny_llama,
    with_second,
)
from lora_probe_callbacks.faults._trials_of_values import TRIALS as OF_VALUES

__all__ = ["trial_of"]


def trial_of(fault: Fault) -> Trial:
    """The run that shows a fault.

    Args:
        fault: One of :data:`~lora_probe_callbacks.faults.FAULTS`.

    Returns:
        A run that was not started yet.
    """
    torch.manual_seed(0)
    return _TRIALS[fault.name]()


_TRIALS: dict[str, Callable[[], Trial]] = {**OF_VALUES}


def _trial(make: Callable[[], Trial]) -> Callable[[], Trial]:
    _TRIALS[make.__name__.removeprefix("_")] = make
    return make


@_trial
def _added_but_not_activated() -> Trial:
    model = lora_model()
    faults.added_but_not_activated(model, "b", lora_config())
    return Trial(model, intent={"adapter": "b"})


@_trial
def _added_after_a_frozen_one() -> Trial:
    model = hooked(faults.loaded_for_inference(tiny_llama(), lora_config()))
    faults.added_after_a_frozen_one(model, "other", lora_config())
    return Trial(model, intent={"adapter": "other"})


@_trial
def _reference_left_trainable() -> Trial:
    model = PeftModel(tiny_llama(), lora_config(inference_mode=True), adapter_name="ref")
    model.add_adapter("policy", lora_config())
    model.set_adapter("policy")
    faults.reference_left_trainable(model, "ref")
    return Trial(model, intent={"adapter": "policy", "reference_adapters": ("ref",)})


@_trial
def _left_disabled() -> Trial:
    model = lora_model(hook=True)
    trial = Trial(model, adamw(model))
    faults.left_disabled(model)
    return trial


@_trial
def _disabled_and_always_enabled() -> Trial:
    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        model.base_model.disable_adapter_layers()
        with faults.disabled_and_always_enabled(model):
            pass  # something else of the base model
        with torch.no_grad():
            reference = next_token_loss(model, ids)  # meant to be the base model
        model.base_model.enable_adapter_layers()
        return preference(next_token_loss(model, ids), reference)

    return Trial(lora_model(), loss=loss, intent={"reference": "disabled"})


@_trial
def _trained_before() -> Trial:
    model = lora_model()
    faults.trained_before(model)
    return Trial(model, loss=against_disabled, intent={"reference": "disabled"})


@_trial
def _reference_not_disabled() -> Trial:
    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        reference = faults.reference_not_disabled(model, input_ids=ids, labels=ids).loss
        return preference(next_token_loss(model, ids), reference)

    return Trial(lora_model(), loss=loss, intent={"reference": "disabled"})


@_trial
def _head_of_reference_left_trainable() -> Trial:
    model = PeftModel(tiny_llama(), lora_config(inference_mode=True, modules_to_save=["lm_head"]), adapter_name="ref")
    model.add_adapter("policy", lora_config())
    model.set_adapter("policy")
    faults.head_of_reference_left_trainable(model, "ref")
    return Trial(model, intent={"adapter": "policy", "reference_adapters": ("ref",)})


@_trial
def _idle_adapter_stepped() -> Trial:
    model = with_second("b")
    model.set_adapter("b")
    optimizer = AdamW(adapter_tensors(model), lr=1e-2, weight_decay=0.1)
    between = at_step(0, lambda: faults.idle_adapter_stepped(optimizer))
    return Trial(model, optimizer, between=between, intent={"adapter": "b"}, set_to_none=False)


@_trial
def _activated_after_forward() -> Trial:
    model = hooked(with_second("other"))

    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        output = faults.activated_after_forward(model, "default", before="other", input_ids=ids, labels=ids)
        model.set_requires_grad("other", requires_grad=False)
        result: Tensor = output.loss
        return result

    return Trial(model, loss=loss, intent={"adapter": "default", "reference_adapters": ("other",)})


@_trial
def _left_merged() -> Trial:
    model = lora_model(hook=True)
    faults.left_merged(model)
    return Trial(model)


@_trial
def _merged_and_unloaded() -> Trial:
    model = lora_model(hook=True)
    faults.merged_and_unloaded(model)
    return Trial(model)


@_trial
def _wrapped_again() -> Trial:
    model = lora_model()
    optimizer = adamw(model)
    return Trial(faults.wrapped_again(model, lora_config()), optimizer)


@_trial
def _wrapped_in_a_second_peft_model() -> Trial:
    model = lora_model()
    faults.trained_before(model)
    return Trial(faults.wrapped_in_a_second_peft_model(model, lora_config()))


@_trial
def _resumed_and_wrapped_anew() -> Trial:
    model = lora_model()
    faults.trained_before(model)
    return Trial(faults.resumed_and_wrapped_anew(model, lora_config()), intent={"resumed": True})


@_trial
def _skipped_because_present() -> Trial:
    model = lora_model(hook=True)
    faults.skipped_because_present(model, lora_config())
    return Trial(model)


@_trial
def _merge_unmerge_cycles() -> Trial:
    model = lora_model(tiny_llama(torch.bfloat16))
    faults.trained_before(model, std=0.05)
    return Trial(model, between=at_step(2, lambda: faults.merge_unmerge_cycles(model)), begins=2)


@_trial
def _loaded_for_inference() -> Trial:
    return Trial(hooked(faults.loaded_for_inference(tiny_llama(), lora_config())))


@_trial
def _prepared_for_kbit_after_wrapping() -> Trial:
    model = lora_model()
    faults.prepared_for_kbit_after_wrapping(model)
    return Trial(model)


@_trial
def _frozen_after_wrapping() -> Trial:
    model = lora_model(hook=True)
    trial = Trial(model, adamw(model))
    faults.frozen_after_wrapping(model)
    return trial


@_trial
def _only_default_marked_trainable() -> Trial:
    model = hooked(get_peft_model(tiny_llama(), lora_config(), adapter_name="abc"))
    faults.only_default_marked_trainable(model)
    return Trial(model)


@_trial
def _unfrozen_base() -> Trial:
    model = lora_model()
    faults.unfrozen_base(model)
    return Trial(model)


@_trial
def _checkpointed_without_input_gradients() -> Trial:
    model = lora_model(target_modules=["q_proj", "v_proj", "lm_head"])
    faults.checkpointed_without_input_gradients(model)
    return Trial(model)


@_trial
def _tower_checkpointed_reentrant() -> Trial:
    model = get_peft_model(Towers(), lora_config(target_modules=["q_proj"]))
    faults.tower_checkpointed_reentrant(model.get_base_model().vision)  # type: ignore[arg-type]
    return Trial(model, loss=squares)


@_trial
def _recompute_with_other_dropout() -> Trial:
    model = lora_model(lora_dropout=0.5)
    faults.trained_before(model)
    faults.recompute_with_other_dropout(model)
    return Trial(model.train())


@_trial
def _optimizer_before_adapter() -> Trial:
    optimizer, model = faults.optimizer_before_adapter(tiny_llama(), lora_config())
    return Trial(model, optimizer)


@_trial
def _attached_when_training_starts() -> Trial:
    """The order of events of Lightning, without it."""
    holder = Holder()
    faults.attached_when_training_starts(holder, "model", lora_config())
    optimizer = AdamW(holder.parameters(), lr=1e-3)
    holder.on_train_start()  # type: ignore[operator]
    return Trial(holder, optimizer, lambda holder, ids, step: next_token_loss(holder.model, ids))


@_trial
def _scheduler_never_stepped() -> Trial:
    model = lora_model()
    optimizer = adamw(model)
    faults.scheduler_never_stepped(optimizer)
    return Trial(model, optimizer)


@_trial
def _embedding_missing_from_loraplus() -> Trial:
    model = lora_model(target_modules=["q_proj", "embed_tokens"])
    return Trial(model, faults.embedding_missing_from_loraplus(model))


@_trial
def _master_copies_from_before() -> Trial:
    model = lora_model()
    optimizer = adamw(model)
    faults.master_copies_from_before(optimizer)
    faults.trained_before(model)  # restored
    return Trial(model, optimizer)


@_trial
def _second_moment_not_representable() -> Trial:
    model = lora_model()
    optimizer = adamw(model)
    faults.second_moment_not_representable(optimizer)
    return Trial(model, optimizer)


@_trial
def _labels_all_masked() -> Trial:
    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        result: Tensor = model(**faults.labels_all_masked({"input_ids": ids})).loss
        return result

    model = lora_model()
    faults.trained_before(model)
    return Trial(model, adamw(model, weight_decay=0.1), loss)


@_trial
def _head_bypassed() -> Trial:
    model = lora_model(target_modules=["q_proj", "lm_head"])
    return Trial(model, loss=lambda model, ids, step: faults.head_bypassed(model, ids))


@_trial
def _projection_inside_a_kernel() -> Trial:
    model = get_peft_model(Block(), lora_config(target_modules=["first", "second"]))
    faults.projection_inside_a_kernel(model.get_base_model(), "first", "second")
    return Trial(model, loss=squares)


@_trial
def _no_advantage() -> Trial:
    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        return faults.no_advantage(model(input_ids=ids).logits.log_softmax(-1))

    model = lora_model()
    return Trial(model, adamw(model, weight_decay=0.0), loss)


@_trial
def _casts_cached_without_gradients() -> Trial:
    model = lora_model(hook=True)
    faults.casts_cached_without_gradients(model)
    return Trial(model)


@_trial
def _outer_autocast() -> Trial:
    model = lora_model()
    return Trial(model, SGD(adapter_tensors(model), lr=50.0), around=faults.outer_autocast("cpu"))


@_trial
def _base_model_called() -> Trial:
    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        result: Tensor = faults.base_model_called(model, input_ids=ids, labels=ids).loss
        return result

    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return Trial(hooked(get_peft_model(tiny_llama(), prompts)), loss=loss)


@_trial
def _half_precision_adapter() -> Trial:
    model = lora_model(tiny_llama(torch.bfloat16))
    faults.half_precision_adapter(model)
    return Trial(model, adamw(model, lr=1e-5, weight_decay=0.0))


@_trial
def _averaged_in_half_precision() -> Trial:
    model = with_second("teacher")
    faults.trained_before(model)
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if ".teacher." in name:
            tensor.data = tensors[name.replace(".teacher.", ".default.")].data.to(torch.bfloat16)
    model.set_adapter("default")

    def between(step: int) -> None:
        if step:
            faults.averaged_in_half_precision(model, "default", "teacher")

    return Trial(model, between=between, intent={"adapter": "default", "lagged_adapters": ("teacher",)})


@_trial
def _overflowing() -> Trial:
    scaler = torch.amp.GradScaler("cpu")
    return Trial(
        lora_model(), loss=lambda model, ids, step: faults.overflowing(next_token_loss(model, ids)), scaler=scaler
    )


@_trial
def _left_in_eval_mode() -> Trial:
    model = lora_model(lora_dropout=0.5)
    faults.left_in_eval_mode(model)
    return Trial(model)


@_trial
def _invocation_tokens_changed() -> Trial:
    tokens = [7, 9]
    model = lora_model(hook=True, task_type="CAUSAL_LM", alora_invocation_tokens=tokens)
    return Trial(
        model, loss=lambda model, ids, step: next_token_loss(model, faults.invocation_tokens_changed(ids, tokens, 8))
    )


@_trial
def _stops_stepping() -> Trial:
    model = lora_model()
    optimizer = adamw(model)
    return Trial(model, optimizer, between=at_step(2, lambda: faults.stops_stepping(optimizer)), begins=2)


@_trial
def _steps_swallowed() -> Trial:
    model = lora_model()
    optimizer = adamw(model)
    faults.steps_swallowed(optimizer)
    return Trial(model, optimizer)


@_trial
def _misspelt_target() -> Trial:
    return Trial(faults.misspelt_target(tiny_llama(), lora_config()))


@_trial
def _head_dropped_by_layer_choice() -> Trial:
    return Trial(faults.head_dropped_by_layer_choice(tiny_llama(), lora_config()))


@_trial
def _one_tower_only() -> Trial:
    model = faults.one_tower_only(Towers(), lora_config(target_modules=["q_proj"]), "vision")
    return Trial(model, loss=squares, intent={"expect_targets": ("vision", "language")})


@_trial
def _experts_that_are_no_modules() -> Trial:
    mixture: Any = faults.experts_that_are_no_modules(LENGTH)
    return Trial(get_peft_model(mixture, lora_config(target_modules=["up_proj", "down_proj"])), loss=squares)


@_trial
def _head_copied_from_a_tie() -> Trial:
    return Trial(faults.head_copied_from_a_tie(tiny_llama(tied=True), lora_config()))


@_trial
def _tokens_added_before_wrapping() -> Trial:
    model = faults.tokens_added_before_wrapping(tiny_llama(), lora_config())
    return Trial(model, intent={"new_token_ids": range(VOCABULARY, VOCABULARY + 4)})


@_trial
def _target_filtered_out() -> Trial:
    model = faults.target_filtered_out(tiny_llama(), lora_config(target_modules=["q_proj", "lm_head"]))
    return Trial(model, intent={"expect_targets": ("q_proj", "lm_head")})


@_trial
def _magnitude_frozen() -> Trial:
    model = lora_model(use_dora=True)
    faults.magnitude_frozen(model)
    return Trial(model)


@_trial
def _principal_part_in_the_adapter() -> Trial:
    model = faults.principal_part_in_the_adapter(tiny_llama(), lora_config())
    return Trial(model, loss=against_disabled, intent={"reference": "disabled"})


@_trial
def _quantisation_error_in_the_adapter() -> Trial:
    model = lora_model()
    faults.quantisation_error_in_the_adapter(model)
    return Trial(model, loss=against_disabled, intent={"reference": "disabled"})


@_trial
def _initialised_after_wrapping() -> Trial:
    model = lora_model()
    faults.initialised_after_wrapping(model)
    return Trial(model, intent={"resumed": False})


@_trial
def _pattern_that_matches_nothing() -> Trial:
    return Trial(faults.pattern_that_matches_nothing(tiny_llama(), lora_config()))
