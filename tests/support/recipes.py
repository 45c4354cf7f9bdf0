"""The public faults as runs: what each front door must report, in which step and in which words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from support.training import Training, adamw, adapter_tensors, config, llama, lora, next_token_loss, trainable, trained
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from lora_probe_callbacks import faults
from lora_probe_callbacks.faults.trials import trial_of


@dataclass(frozen=True)
class Recipe:
    """A run with a fault in it, and what must be found.

    Attributes:
        name: The entry of the public fault and a word for its variant.
        build: Makes the run.
        code: The check that reports it, and no other.
        step: The step of the finding.
        words: Parts of the message.
        status: "fail", or "warn" where the check is documented to warn.
        intent: Keyword arguments of the probe.
        evidence: Parts of the evidence.
        warnings: What torch or PEFT say about it themselves, as filters.
        steps: How long the run is.
    """

    name: str
    build: Callable[[], Training]
    code: str
    step: int
    words: tuple[str, ...]
    status: str = "fail"
    intent: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    steps: int = 8


RECIPES: list[Recipe] = []


def recipe(
    name: str,
    code: str,
    step: int,
    *words: str,
    status: str = "fail",
    evidence: dict[str, object] | None = None,
    warnings: tuple[str, ...] = (),
    steps: int = 8,
    into: list[Recipe] = RECIPES,
    **intent: Any,
) -> Callable[[Callable[[], Training]], Callable[[], Training]]:
    def enter(build: Callable[[], Training]) -> Callable[[], Training]:
        into.append(Recipe(name, build, code, step, words, status, intent, evidence or {}, warnings, steps))
        return build

    return enter


def parameters(recipes: list[Recipe]) -> list[Any]:
    """For ``pytest.mark.parametrize``."""
    return [
        pytest.param(item, id=item.name, marks=[pytest.mark.filterwarnings(w) for w in item.warnings])
        for item in recipes
    ]


# PEFT and torch do warn of these; the warning scrolls by among many.
TWICE = (
    "ignore:You are trying to modify a model with PEFT for a second time:UserWarning",
    "ignore:Already found a `peft_config` attribute in the model:UserWarning",
)
NO_INPUT_GRADIENTS = ("ignore:None of the inputs have requires_grad=True:UserWarning",)


# --- family 1: not active -----------------------------------------------------------------------


@recipe("A01", "LP101", 0, "'b'", "not active", "['default']", adapter="b")
@recipe("A01-undeclared", "LP108", 3, "'b'", "never active", status="warn")
def added() -> Training:
    model = lora()
    faults.added_but_not_activated(model, "b", config())
    return Training(model)


@recipe("A05", "LP207", 0, "'ref'", "trainable", "instead of", adapter="pol", reference_adapters=("ref",))
def reference_before_training() -> Training:
    model = PeftModel(llama(), config(inference_mode=True), adapter_name="ref")
    model.add_adapter("pol", config())
    model.set_adapter("pol")
    faults.reference_left_trainable(model, "ref")
    return Training(model)


@recipe("A05-in-training", "LP207", 2, "'ref'", "trainable", adapter="pol", reference_adapters=("ref",))
def reference_in_training() -> Training:
    run = reference_before_training()
    run.model.base_model.set_adapter("ref", inference_mode=True)
    run.model.set_adapter("pol")

    def score_the_reference(run: Training, step: int) -> None:
        if step == 2:
            faults.reference_left_trainable(run.model, "ref")

    run.between_steps = score_the_reference
    return run


@recipe("A06", "LP102", 0, "disabled", "no gradient")
def disabled() -> Training:
    model = lora(hook=True)
    run = Training(model, optimizer=adamw(model))
    faults.left_disabled(model)
    return run


@recipe("A06-transformers", "LP102", 0, "disabled")
def disabled_native() -> Training:
    model = llama()
    model.add_adapter(config())
    model.enable_input_require_grads()
    run = Training(model, optimizer=adamw(model))
    model.disable_adapters()
    return run


@recipe("A13", "LP404", 0, "'default'", "not active", "moved", adapter="b")
def idle_adapter_moves() -> Training:
    model = lora()
    model.add_adapter("b", config())
    model.set_adapter("b")
    optimizer = AdamW(list(adapter_tensors(model).values()), lr=1e-2, weight_decay=0.1)

    def earlier_phase(run: Training, step: int) -> None:
        if step == 0:
            faults.idle_adapter_stepped(optimizer)

    return Training(model, optimizer=optimizer, set_to_none=False, between_steps=earlier_phase)


@recipe(
    "origin", "LP105", 0, "activated after the forward", "['other']", adapter="default", reference_adapters=("other",)
)
def activated_late() -> Training:
    model = lora(hook=True)
    model.add_adapter("other", config())

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        output = faults.activated_after_forward(model, "default", before="other", input_ids=batch, labels=batch)
        model.set_requires_grad("other", requires_grad=False)
        return output.loss

    return Training(model, loss)


# --- family 2: merged, unloaded, wrapped again --------------------------------------------------


@recipe("B01", "LP103", 0, "merged", "no gradient")
def merged() -> Training:
    model = lora(hook=True)
    faults.left_merged(model)
    return Training(model)


@recipe("B02-wrapper", "LP103", 0, "without a single adapter tensor")
def unloaded_wrapper() -> Training:
    model = lora(hook=True)
    faults.merged_and_unloaded(model)
    return Training(model)


@recipe("B03", "LP202", 0, "8 tensors that the model does not hold", "replaced", warnings=TWICE)
def wrapped_twice() -> Training:
    model = lora()
    optimizer = adamw(model)
    return Training(faults.wrapped_again(model, config()), optimizer=optimizer)


@recipe("B04", "LP107", 0, "PeftModel is wrapped in a PeftModel", warnings=TWICE)
def wrapped_around() -> Training:
    model = lora()
    trained(model)
    return Training(faults.wrapped_in_a_second_peft_model(model, config()))


@recipe("B06", "LP203", 0, "all 8 tensors", "frozen")
def passed_over() -> Training:
    model = lora(hook=True)
    faults.skipped_because_present(model, config())
    return Training(model)


@recipe("B09", "LP404", 2, "frozen base weight", "drifted")
def merge_cycles() -> Training:
    model = lora(base=llama(torch.bfloat16))
    trained(model, std=0.05)

    def sync(run: Training, step: int) -> None:
        if step == 2:
            faults.merge_unmerge_cycles(run.model)

    return Training(model, between_steps=sync)


# --- family 3: frozen, or not frozen ------------------------------------------------------------


@recipe("C01", "LP203", 0, "all 8 tensors", "frozen")
def for_inference() -> Training:
    model = faults.loaded_for_inference(llama(), config())
    model.enable_input_require_grads()
    return Training(model)


@recipe("C01-set_adapter", "LP203", 0, "all 8 tensors", "frozen")
def set_for_inference() -> Training:
    model = lora(hook=True)
    model.base_model.set_adapter("default", inference_mode=True)
    return Training(model)


@recipe("C03", "LP203", 0, "all 8 tensors", "frozen")
def kbit() -> Training:
    model = lora()
    faults.prepared_for_kbit_after_wrapping(model)
    return Training(model)


@recipe("C04", "LP203", 0, "all 8 tensors", "frozen")
def frozen() -> Training:
    model = lora(hook=True)
    run = Training(model, optimizer=adamw(model))
    faults.frozen_after_wrapping(model)
    return run


@recipe("C07", "LP206", 0, "base weights of 4 adapted layers", "trainable")
def unfrozen() -> Training:
    model = lora()
    faults.unfrozen_base(model)
    return Training(model)


# --- family 4: checkpointing --------------------------------------------------------------------


@recipe("D01", "LP302", 0, "8 adapter tensors", "q_proj", "no gradient (None)", warnings=NO_INPUT_GRADIENTS)
def no_input_gradients() -> Training:
    model = lora(target_modules=["q_proj", "v_proj", "lm_head"])
    faults.checkpointed_without_input_gradients(model)
    return Training(model)


@recipe("D04", "LP307", 1, "not that of the loss", evidence={"got": "finite difference over gradient 0."})
def other_dropout() -> Training:
    model = lora(lora_dropout=0.5)
    trained(model)
    faults.recompute_with_other_dropout(model)
    return Training(model)


class TwoTowers(nn.Module):
    """A vision tower on data and a language head on what it makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Linear(12, 16), nn.ReLU())
        self.language = nn.Linear(16, 8)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.language(self.vision(pixels))


def squares(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    return model(batch.float() / 64).pow(2).mean()


@recipe("D02", "LP302", 0, "2 adapter tensors", "vision", "no gradient (None)", warnings=NO_INPUT_GRADIENTS)
def tower() -> Training:
    torch.manual_seed(0)
    model = get_peft_model(TwoTowers(), LoraConfig(r=2, target_modules=["vision.0", "language"]))
    faults.tower_checkpointed_reentrant(model.get_base_model().vision)
    return Training(model, squares)


class Checkpointed(TwoTowers):
    def forward(self, pixels: Tensor) -> Tensor:
        return self.language(checkpoint(self.vision, pixels, use_reentrant=True))


@recipe("D02-own-block", "LP302", 0, "2 adapter tensors", "vision", "no gradient (None)", warnings=NO_INPUT_GRADIENTS)
def own_tower() -> Training:
    torch.manual_seed(0)
    return Training(get_peft_model(Checkpointed(), LoraConfig(r=2, target_modules=["vision.0", "language"])), squares)


# --- family 5: optimizer ------------------------------------------------------------------------


@recipe("E01", "LP201", 0, "8 of 8 adapter tensors are in no optimizer")
def early_optimizer() -> Training:
    optimizer, model = faults.optimizer_before_adapter(llama(), config())
    return Training(model, optimizer=optimizer)


@recipe("E06", "LP208", 3, "learning rate is exactly 0")
def unstepped_scheduler() -> Training:
    model = lora()
    optimizer = adamw(model)
    faults.scheduler_never_stepped(optimizer)
    return Training(model, optimizer=optimizer)


def masked_loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    return model(**faults.labels_all_masked({"input_ids": batch})).loss


@recipe("E11", "LP001", 0, "no token of this batch is supervised")
def masked_with_decay() -> Training:
    model = lora()
    trained(model)
    return Training(model, masked_loss, optimizer=adamw(model, lr=1e-2, weight_decay=0.1))


@recipe("E11-no-decay", "LP001", 0, "no token of this batch is supervised")
def masked_without_decay() -> Training:
    model = lora()
    return Training(model, masked_loss, optimizer=adamw(model, weight_decay=0.0))


# --- family 6: the forward passes the adapter by ------------------------------------------------


@recipe("G01", "LP104", 1, "lm_head", "base weight is used", "never called")
def fused_loss() -> Training:
    model = lora(target_modules=["q_proj", "lm_head"])
    return Training(model, lambda model, batch, step: faults.head_bypassed(model, batch))


@recipe("G05-always", "LP303", 3, "every adapter gradient is exactly zero")
def never_an_advantage() -> Training:
    model = lora()

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return faults.no_advantage(model(input_ids=batch).logits.log_softmax(-1))

    return Training(model, loss, optimizer=adamw(model, weight_decay=0.0))


@recipe("G07", "LP405", 1, "does not see the present parameters")
def one_autocast() -> Training:
    model = lora()
    return Training(
        model, optimizer=torch.optim.SGD(trainable(model), lr=50.0), around=lambda: faults.outer_autocast("cpu")
    )


@recipe("G08", "LP209", 0, "the loss was made by", "LlamaForCausalLM")
def prompt_passed_by() -> Training:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.enable_input_require_grads()

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return faults.base_model_called(model, input_ids=batch, labels=batch).loss

    return Training(model, loss)


# --- family 7: precision ------------------------------------------------------------------------


@recipe("H02", "LP403", 3, "lora_A", "lost to rounding")
def half() -> Training:
    model = get_peft_model(llama(torch.bfloat16), config())
    faults.half_precision_adapter(model)
    return Training(model, optimizer=adamw(model, lr=1e-5, weight_decay=0.0))


@recipe("H02-autocast_adapter_dtype", "LP403", 3, "lora_A", "lost to rounding")
def half_from_the_start() -> Training:
    model = get_peft_model(llama(torch.bfloat16), config(), autocast_adapter_dtype=False)
    return Training(model, optimizer=adamw(model, lr=1e-5, weight_decay=0.0))


def infinite(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    return faults.overflowing(next_token_loss(model, batch, step))


@recipe("H04", "LP406", 3, "4 steps in a row were skipped", "not finite")
def overflow() -> Training:
    return Training(lora(), infinite, precision="16-mixed")


@recipe("H04-no-scaler", "LP501", 0, "nan", "adapter tensors")
def overflow_applied() -> Training:
    return Training(lora(), infinite)


@recipe("H06", "LP401", 3, "no step has moved the adapter")
def swallowed() -> Training:
    model = lora()
    optimizer = adamw(model)
    faults.steps_swallowed(optimizer)
    return Training(model, optimizer=optimizer)


# --- what was healthy at first, and is not from step 3 on ---------------------------------------


def from_step(number: int, change: Callable[[Training], None]) -> Callable[[Training, int], None]:
    def between_steps(run: Training, step: int) -> None:
        if step == number:
            change(run)

    return between_steps


def regression(*changes: str) -> dict[str, object]:
    return {"last healthy step": 2, "changed since": " ".join(changes)}


@recipe("B01-at-3", "LP103", 3, "merged", evidence=regression("'merged'"))
def merged_at_3() -> Training:
    return Training(lora(hook=True), between_steps=from_step(3, lambda run: faults.left_merged(run.model)))


@recipe("A06-at-3", "LP102", 3, "disabled", evidence=regression("'disabled'"))
def disabled_at_3() -> Training:
    return Training(lora(hook=True), between_steps=from_step(3, lambda run: faults.left_disabled(run.model)))


@recipe("A01-switch-at-3", "LP101", 3, "'default'", evidence=regression("active_adapters ['default'] -> ['b']"))
def switched_at_3() -> Training:
    model = lora()
    model.add_adapter("b", config())
    return Training(
        model,
        optimizer=AdamW(list(adapter_tensors(model).values()), lr=1e-3),
        between_steps=from_step(3, lambda run: run.model.set_adapter("b")),
    )


@recipe("C04-at-3", "LP203", 3, "frozen", evidence=regression("trainable tensors 8 -> 0"))
def frozen_at_3() -> Training:
    return Training(lora(hook=True), between_steps=from_step(3, lambda run: faults.frozen_after_wrapping(run.model)))


@recipe("B03-at-3", "LP202", 3, "8 tensors that the model does not hold", evidence=regression("8 -> 0"))
def replaced_at_3() -> Training:
    def change(run: Training) -> None:
        run.model.delete_adapter("default")
        run.model.add_adapter("default", config())
        run.model.set_adapter("default")

    return Training(lora(), between_steps=from_step(3, change))


@recipe("B03-assign-at-3", "LP202", 3, "8 tensors that the model does not hold", evidence=regression("8 -> 0"))
def assigned_at_3() -> Training:
    def change(run: Training) -> None:
        state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        run.model.load_state_dict(state, assign=True)
        for tensor in adapter_tensors(run.model).values():
            tensor.requires_grad_(True)

    return Training(lora(), between_steps=from_step(3, change))


# --- the runs of `lora-probe selftest`, under a front door ----------------------------------------


def of_selftest(name: str) -> Training:
    """The package's own run of a fault, for whichever front door fits it."""
    trial = trial_of(faults.FAULTS[name])
    return Training(
        trial.model,
        trial.loss,
        optimizer=adamw if trial.optimizer is None else trial.optimizer,
        between_steps=lambda run, step: trial.between(step),
        set_to_none=trial.set_to_none,
    )


def from_selftest(entry: str, name: str, code: str, step: int, *words: str, **options: Any) -> None:
    recipe(entry, code, step, *words, **options)(partial(of_selftest, name))


from_selftest("A04", "added_after_a_frozen_one", "LP101", 0, "'other'", "not active", "['default']", adapter="other")
if Version(peft.__version__) >= Version("0.21"):  # before, the old adapter trains, and nothing is frozen
    from_selftest("A04-undeclared", "added_after_a_frozen_one", "LP203", 0, "all 8 tensors", "frozen")
from_selftest(
    "A08", "disabled_and_always_enabled", "LP109", 3, "no forward ran with the adapters disabled", reference="disabled"
)
from_selftest(
    "A09",
    "trained_before",
    "LP504",
    0,
    "the reference is not where the policy starts",
    "4 of 4",
    status="warn",
    reference="disabled",
)
from_selftest(
    "A10", "reference_not_disabled", "LP109", 3, "policy and reference are the same weights", reference="disabled"
)
from_selftest(
    "A11",
    "head_of_reference_left_trainable",
    "LP207",
    0,
    "'ref'",
    "1 of its 9 tensors",
    adapter="policy",
    reference_adapters=("ref",),
)
from_selftest(
    "B04-plain",
    "resumed_and_wrapped_anew",
    "LP504",
    0,
    "the restored adapter is a fresh one",
    "all 4 adapted layers",
    resumed=True,
    warnings=TWICE,
)
from_selftest("C05", "only_default_marked_trainable", "LP203", 0, "all 8 tensors of adapter 'abc'", "frozen")
from_selftest(
    "E07",
    "embedding_missing_from_loraplus",
    "LP210",
    0,
    "lora_embedding_B has the learning rate of A",
    "while every other B has",
    status="warn",
)
from_selftest("E08", "master_copies_from_before", "LP407", 0, "one step erased the adapter", "all 4 adapted layers")
from_selftest("E10", "second_moment_not_representable", "LP501", 1, "nan")
from_selftest("G03", "projection_inside_a_kernel", "LP104", 1, "second", "base weight is used", "never called")
from_selftest("G06", "casts_cached_without_gradients", "LP301", 0)
from_selftest(
    "H03",
    "averaged_in_half_precision",
    "LP408",
    3,
    "'teacher'",
    "not one bit changed",
    adapter="default",
    lagged_adapters=("teacher",),
)
from_selftest("J01", "misspelt_target", "LP601", 0, "target_modules asks for 'gate_porj'", status="warn")
from_selftest("J02", "head_dropped_by_layer_choice", "LP601", 0, "asks for 'lm_head'", status="warn")
from_selftest(
    "J03", "one_tower_only", "LP601", 0, "no adapted module has 'language'", expect_targets=("vision", "language")
)
from_selftest("J04", "experts_that_are_no_modules", "LP606", 0, "2 fused expert weights", "experts", status="warn")
from_selftest("J04-expected", "experts_that_are_no_modules", "LP601", 0, "'experts'", expect_targets=("experts",))
from_selftest(
    "J05",
    "head_copied_from_a_tie",
    "LP607",
    0,
    "lm_head is trained as a copy",
    "embed_tokens",
    status="warn",
    warnings=("ignore:Model has `tie_word_embeddings=True`",),
)
from_selftest(
    "J06",
    "tokens_added_before_wrapping",
    "LP604",
    0,
    "4 of 4 new tokens",
    "token 64, 65, 66",
    new_token_ids=range(64, 68),
)
from_selftest(
    "J07", "target_filtered_out", "LP601", 0, "no adapted module has 'lm_head'", expect_targets=("q_proj", "lm_head")
)
from_selftest("J08", "magnitude_frozen", "LP605", 0, "every lora_magnitude_vector", "frozen, 4 tensors")
from_selftest(
    "J09", "principal_part_in_the_adapter", "LP504", 0, "the reference is not the base model", reference="disabled"
)
from_selftest("J11", "initialised_after_wrapping", "LP504", 0, "the new adapter is not the identity", resumed=False)
from_selftest(
    "J13",
    "pattern_that_matches_nothing",
    "LP602",
    0,
    "rank_pattern has 'q_porj'",
    status="warn",
    warnings=("ignore:The following .* keys did not match:RuntimeWarning",),
)
from_selftest(
    "J14", "quantisation_error_in_the_adapter", "LP504", 0, "the reference is not the base model", reference="disabled"
)
from_selftest(
    "R01", "average_left_in_place", "LP409", 4, "taken back", "way of 2 steps", "the 2nd time", "8 adapter tensors"
)
from_selftest(
    "R02", "restarted_without_merging", "LP409", 4, "taken back", "between the end of step 3 and the update of step 4"
)
from_selftest("R03", "norms_left_in_training_mode", "LP808", 0, "running_mean", "will not hold", status="warn")
from_selftest(
    "R04",
    "averaged_in_another_order",
    "LP408",
    4,
    "'teacher'",
    "follows other tensors",
    adapter="default",
    lagged_adapters=("teacher",),
)
