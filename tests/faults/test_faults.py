"""Every public fault is reported, in time, for the right reason."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.recipes import RECIPES, Recipe, from_step, parameters
from support.training import (
    Loop,
    Training,
    adamw,
    adapter_tensors,
    assert_found,
    assert_healthy,
    config,
    llama,
    lora,
    next_token_loss,
    watch,
)

from lora_probe_callbacks import LoraProbeError, faults
from lora_probe_callbacks.checks._catalogue import all_checks
from lora_probe_callbacks.faults import FAULTS, Fault


@pytest.mark.parametrize("recipe", parameters(RECIPES))
def test_fault_is_reported_under_lightning(recipe: Recipe) -> None:
    watched = watch(recipe.build(), every_n_steps=1, **recipe.intent)
    assert_found(watched, recipe.code, recipe.step, *recipe.words, status=recipe.status, evidence=recipe.evidence)
    if recipe.status == "fail":
        assert isinstance(watched.error, LoraProbeError)
        assert [f.code for f in watched.error.findings] == [recipe.code]
    else:
        assert watched.error is None


@pytest.mark.parametrize("recipe", parameters([r for r in RECIPES if r.step]))
def test_default_cadence_finds_it_in_the_same_step(recipe: Recipe) -> None:
    watched = watch(recipe.build(), **recipe.intent)
    assert_found(watched, recipe.code, recipe.step, *recipe.words, status=recipe.status, evidence=recipe.evidence)


def test_fault_between_two_probed_steps_is_reported_in_the_next_probed_one() -> None:
    run = Training(lora(hook=True), between_steps=from_step(6, lambda run: faults.left_merged(run.model)))
    assert_found(watch(run, steps=12, every_n_steps=5), "LP103", 10, "merged", evidence={"last healthy step": 5})


@pytest.mark.parametrize("accumulate", [1, 4])
def test_fault_is_reported_before_the_update_that_it_would_spoil(accumulate: int) -> None:
    """A merged adapter and a trainable head: without the probe the head would go on alone."""
    model = lora(modules_to_save=["lm_head"])
    before = {}

    def change(run: Training) -> None:
        faults.left_merged(run.model)
        before.update({n: p.detach().clone() for n, p in run.model.named_parameters() if "modules_to_save" in n})

    run = Training(model, between_steps=from_step(2 * accumulate, change), accumulate=accumulate)
    watched = watch(run, every_n_steps=1)
    assert [code for code, _, step in watched.found if step == 2] == ["LP103"], watched.found
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


# --- loud: the run ends by itself, and the probe says why -----------------------------------------


LOUD = {
    "LP102": faults.left_disabled,
    "LP103": faults.left_merged,
    "LP203": faults.frozen_after_wrapping,
}


@pytest.mark.parametrize("code", LOUD)
@pytest.mark.parametrize("step", [0, 2])
def test_without_the_input_gradient_hook_the_users_error_is_annotated(code: str, step: int) -> None:
    model = lora()
    run = Training(model, optimizer=adamw(model), between_steps=from_step(step, lambda run: LOUD[code](run.model)))
    watched = watch(run, every_n_steps=1)
    if isinstance(watched.error, LoraProbeError):  # seen before the forward, at the start or by a flag
        assert code == "LP203"
        assert_found(watched, code, step)
        return
    assert isinstance(watched.error, RuntimeError)
    assert "does not require grad" in str(watched.error)
    assert [code in note for note in watched.error.__notes__] == [True], watched.error.__notes__
    assert_found(watched, code, step)


def test_prompt_tuning_passed_by_without_the_hook_is_annotated() -> None:
    recipe = next(r for r in RECIPES if r.name == "G08")
    run = recipe.build()
    run.model.disable_input_require_grads()
    watched = watch(run)
    assert isinstance(watched.error, RuntimeError)
    assert "LP209" in watched.error.__notes__[0]
    assert_found(watched, "LP209", 0)


def test_float16_adapter_under_a_scaler_stays_the_users_error() -> None:
    """H01, a control: GradScaler refuses float16 gradients, loudly."""
    model = lora()
    for tensor in adapter_tensors(model).values():
        tensor.data = tensor.data.half()
    watched = watch(Training(model, precision="16-mixed"))
    assert isinstance(watched.error, ValueError)
    assert "Attempting to unscale FP16 gradients" in str(watched.error)
    assert not watched.found


# --- what only one front door has ---------------------------------------------------------------


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_adapter_attached_after_configure_optimizers_is_in_no_optimizer(hook: str) -> None:
    """E02."""
    module = Loop(Training(llama()))
    faults.attached_when_training_starts(module, "model", config())
    if hook == "on_fit_start":
        module.on_fit_start, module.on_train_start = module.on_train_start, lambda: None
    assert_found(watch(module), "LP201", 0, "8 of 8 adapter tensors are in no optimizer")


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_adapter_attached_before_configure_optimizers_is_healthy(hook: str) -> None:
    class Attaching(Loop):
        def attach(self, stage: str = "") -> None:
            self.model = self.run.model = lora(base=self.model)

    setattr(Attaching, hook, Attaching.attach)
    assert_healthy(watch(Attaching(Training(llama()))))


def test_merged_and_unloaded_base_model_is_refused_at_the_start() -> None:
    """B02: no adapter is left to watch."""
    watched = watch(Training(faults.merged_and_unloaded(lora(hook=True))))
    assert isinstance(watched.error, ValueError)
    assert "found no PEFT adapter" in str(watched.error)


# --- controls: healthy once, a fault when it lasts -----------------------------------------------


def test_one_batch_without_advantage_is_healthy() -> None:
    """G05."""

    def loss(model: torch.nn.Module, batch: torch.Tensor, step: int) -> torch.Tensor:
        log_probs = model(input_ids=batch).logits.log_softmax(-1)
        return faults.no_advantage(log_probs) if step in (0, 3) else -log_probs.mean()

    assert_healthy(watch(Training(lora(), loss), every_n_steps=1))


def test_first_overflows_of_mixed_precision_are_healthy() -> None:
    """H04, while the scale is being found."""

    def loss(model: torch.nn.Module, batch: torch.Tensor, step: int) -> torch.Tensor:
        value = next_token_loss(model, batch, step)
        return faults.overflowing(value) if step < 3 else value

    assert_healthy(watch(Training(lora(), loss, precision="16-mixed"), every_n_steps=1))


def test_a_few_merges_in_float32_are_healthy() -> None:
    """B09, look-alike: rounding of float32 is not drift."""
    run = Training(lora(), between_steps=lambda run, step: faults.merge_unmerge_cycles(run.model, 3))
    assert_healthy(watch(run, every_n_steps=1))


def test_lora_called_through_its_base_model_is_healthy() -> None:
    """G08, look-alike: LoRA is injected in place."""

    def loss(model: torch.nn.Module, batch: torch.Tensor, step: int) -> torch.Tensor:
        return faults.base_model_called(model, input_ids=batch, labels=batch).loss

    assert_healthy(watch(Training(lora(), loss), every_n_steps=1))


# --- the list itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [pytest.param(f, id=name) for name, f in FAULTS.items()])
def test_fault_says_what_finds_it_and_where_it_comes_from(fault: Fault) -> None:
    codes = {check.code for check in all_checks()}
    document = fault.inject.__doc__ or ""
    assert fault.code in codes
    assert fault.code in document
    assert fault.entry == "origin" or fault.threads
    assert all("#" in thread and "/" in thread for thread in fault.threads)
    assert fault.name in faults.__all__
    assert getattr(faults, fault.name) is fault.inject


def test_every_fault_is_run_by_a_recipe_that_expects_its_code_and_step() -> None:
    for fault in FAULTS.values():
        # E02 is Lightning's alone, above; P03 is in tests/engine/test_stopped.py, at the cadence at which it hides; P08
        # depends on what a framework calls by itself, and on the batches: in tests/healthy/test_intent.py.
        if fault.entry not in ("E02", "P03", "P08"):
            recipes = [r for r in RECIPES if r.name.split("-")[0] == fault.entry and r.code == fault.code]
            assert recipes, fault
            # The first of them injects the fault before step 0, but for the drift of a base weight.
            assert recipes[0].step == fault.by_step + (2 if fault.entry == "B09" else 0), (fault, recipes[0])


def test_faults_load_no_framework() -> None:
    code = (
        "import sys, lora_probe_callbacks.faults; "
        "print([m for m in ('lightning', 'peft', 'transformers', 'bitsandbytes') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
