"""Real faults of LoRA fine-tuning, to inject into a run of your own.

Each function does to your model, optimizer, batch or loss what a public bug report describes, and
nothing else: nothing is printed, and in most of these runs the loss looks right. Put one into a
script that works, start it with the probe, and see which check stops it and when::

    model = get_peft_model(base, config)
    model.enable_input_require_grads()      # what gradient checkpointing does to every text model
    faults.left_merged(model)
    trainer.fit(...)                        # LP103 before the first update

Without ``enable_input_require_grads()`` the faults that cut off the whole adapter are loud: the
backward raises "element 0 of tensors does not require grad", and the probe adds the reason to that
exception as a note.

:data:`FAULTS` lists them all with the code of the check that finds each of them.
"""

from __future__ import annotations

from lora_probe_callbacks.faults._fault import Fault
from lora_probe_callbacks.faults._fault import found as _found
from lora_probe_callbacks.faults.activation import (
    activated_after_forward,
    added_after_a_frozen_one,
    added_but_not_activated,
    disabled_and_always_enabled,
    head_of_reference_left_trainable,
    idle_adapter_stepped,
    invocation_tokens_changed,
    left_disabled,
    left_in_eval_mode,
    reference_left_trainable,
    reference_not_disabled,
    trained_before,
)
from lora_probe_callbacks.faults.graph import (
    base_model_called,
    casts_cached_without_gradients,
    checkpointed_without_input_gradients,
    head_bypassed,
    no_advantage,
    outer_autocast,
    projection_inside_a_kernel,
    recompute_with_other_dropout,
    tower_checkpointed_reentrant,
)
from lora_probe_callbacks.faults.optimizer import (
    attached_when_training_starts,
    averaged_in_half_precision,
    embedding_missing_from_loraplus,
    half_precision_adapter,
    labels_all_masked,
    master_copies_from_before,
    optimizer_before_adapter,
    overflowing,
    scheduler_never_stepped,
    second_moment_not_representable,
    steps_swallowed,
    stops_stepping,
)
from lora_probe_callbacks.faults.targets import (
    experts_that_are_no_modules,
    head_copied_from_a_tie,
    head_dropped_by_layer_choice,
    initialised_after_wrapping,
    magnitude_frozen,
    misspelt_target,
    one_tower_only,
    pattern_that_matches_nothing,
    principal_part_in_the_adapter,
    quantisation_error_in_the_adapter,
    target_filtered_out,
    tokens_added_before_wrapping,
)
from lora_probe_callbacks.faults.values import (
    average_left_in_place,
    averaged_in_another_order,
    norms_left_in_training_mode,
    restarted_without_merging,
)
from lora_probe_callbacks.faults.wrapping import (
    frozen_after_wrapping,
    left_merged,
    loaded_for_inference,
    merge_unmerge_cycles,
    merged_and_unloaded,
    only_default_marked_trainable,
    prepared_for_kbit_after_wrapping,
    resumed_and_wrapped_anew,
    skipped_because_present,
    unfrozen_base,
    wrapped_again,
    wrapped_in_a_second_peft_model,
)

__all__ = [
    "FAULTS",
    "Fault",
    "activated_after_forward",
    "added_after_a_frozen_one",
    "added_but_not_activated",
    "attached_when_training_starts",
    "average_left_in_place",
    "averaged_in_another_order",
    "averaged_in_half_precision",
    "base_model_called",
    "casts_cached_without_gradients",
    "checkpointed_without_input_gradients",
    "disabled_and_always_enabled",
    "embedding_missing_from_loraplus",
    "experts_that_are_no_modules",
    "frozen_after_wrapping",
    "half_precision_adapter",
    "head_bypassed",
    "head_copied_from_a_tie",
    "head_dropped_by_layer_choice",
    "head_of_reference_left_trainable",
    "idle_adapter_stepped",
    "initialised_after_wrapping",
    "invocation_tokens_changed",
    "labels_all_masked",
    "left_disabled",
    "left_in_eval_mode",
    "left_merged",
    "loaded_for_inference",
    "magnitude_frozen",
    "master_copies_from_before",
    "merge_unmerge_cycles",
    "merged_and_unloaded",
    "misspelt_target",
    "no_advantage",
    "norms_left_in_training_mode",
    "one_tower_only",
    "only_default_marked_trainable",
    "optimizer_before_adapter",
    "outer_autocast",
    "overflowing",
    "pattern_that_matches_nothing",
    "prepared_for_kbit_after_wrapping",
    "principal_part_in_the_adapter",
    "projection_inside_a_kernel",
    "quantisation_error_in_the_adapter",
    "recompute_with_other_dropout",
    "reference_left_trainable",
    "reference_not_disabled",
    "restarted_without_merging",
    "resumed_and_wrapped_anew",
    "scheduler_never_stepped",
    "second_moment_not_representable",
    "skipped_because_present",
    "steps_swallowed",
    "stops_stepping",
    "target_filtered_out",
    "tokens_added_before_wrapping",
    "tower_checkpointed_reentrant",
    "trained_before",
    "unfrozen_base",
    "wrapped_again",
    "wrapped_in_a_second_peft_model",
]

FAULTS: dict[str, Fault] = {f.name: f for f in sorted(_found, key=lambda f: (f.entry == "origin", f.entry))}
"""Name to fault, in the order of the entries; the bug that this package began with comes last."""
