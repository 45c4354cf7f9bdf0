"""The three front doors say the same of the same run."""

from __future__ import annotations

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from support.doors import DOORS, watch_through
from support.recipes import RECIPES, Recipe, parameters
from support.training import Training, config, llama, lora, next_token_loss
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lora_probe_callbacks import LoraProbeError, faults


@pytest.mark.parametrize("recipe", parameters(RECIPES))
def test_fault_is_found_at_the_same_step_for_the_same_cause_behind_every_door(recipe: Recipe) -> None:
    found, errors = {}, {}
    for door in DOORS:
        watched = watch_through(door, recipe.build(), every_n_steps=1, **recipe.intent)
        found[door] = [(f.code, f.step, f.cause) for f in watched.report.with_status("fail", "warn")]
        errors[door] = type(watched.error)
    assert found["lightning"] == found["plain"] == found["trainer"], (found, errors)
    assert [(code, step) for code, step, _ in found["plain"]] == [(recipe.code, recipe.step)]
    ending = LoraProbeError if recipe.status == "fail" else type(None)
    assert set(errors.values()) == {ending}, errors


# --- healthy runs ---------------------------------------------------------------------------------


def checkpointed(*, reentrant: bool) -> Training:
    base = llama()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return Training(lora(hook=True, base=base))


def dpo(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    """The adapter disabled is the reference."""

    def log_probs() -> Tensor:
        return model(input_ids=batch).logits.log_softmax(-1).gather(-1, batch[..., None])[..., 0].sum(-1)

    with torch.no_grad(), model.disable_adapter():
        reference = log_probs()
    margin = log_probs() - reference
    return -nn.functional.logsigmoid(margin[0] - margin[1])


def generates(run: Training, step: int) -> None:
    run.model.merge_adapter()
    with torch.no_grad():
        run.model(input_ids=torch.ones(1, 4, dtype=torch.long))
    run.model.unmerge_adapter()


def sometimes_without_advantage(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    log_probs = model(input_ids=batch).logits.log_softmax(-1)
    return faults.no_advantage(log_probs) if step in (0, 3, 4) else -log_probs.mean()


def overflowing_at_first(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    loss = next_token_loss(model, batch, step)
    return faults.overflowing(loss) if step in (0, 1, 2) else loss


def native() -> Training:
    model = llama()
    model.add_adapter(config())
    return Training(model)


def prompt_tuning() -> Training:
    return Training(get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)))


HEALTHY = {
    "plain": lambda: Training(lora(lora_dropout=0.1)),
    "accumulation": lambda: Training(lora(), accumulate=3),
    "bf16": lambda: Training(lora(), precision="bf16-mixed"),
    "first overflows": lambda: Training(lora(), overflowing_at_first, precision="16-mixed"),
    "checkpointed": lambda: checkpointed(reentrant=False),
    "checkpointed reentrant": lambda: checkpointed(reentrant=True),
    "warm-up": lambda: Training(lora(), scheduler=lambda o: LambdaLR(o, lambda step: min(1.0, step / 4))),
    "dpo": lambda: Training(lora(), dpo),
    "merge, generate, unmerge": lambda: Training(lora(), between_steps=generates),
    "no advantage now and then": lambda: Training(lora(), sometimes_without_advantage),
    "transformers' own adapter": native,
    "prompt tuning": prompt_tuning,
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_run_is_judged_alike_behind_every_door(name: str) -> None:
    judged = {}
    for door in DOORS:
        watched = watch_through(door, HEALTHY[name](), every_n_steps=1)
        assert watched.error is None, (door, watched.error)
        assert not watched.found, (door, str(watched.report))
        assert watched.report.judged_steps == 8, door
        judged[door] = {
            f.code: (f.status, f.last_step if f.status == "pass" else None)
            for f in watched.report.findings
            if f.code != "LP405"  # Lightning's autocast keeps no cache, so nothing in it can be stale
        }
    assert judged["lightning"] == judged["plain"] == judged["trainer"]
    assert sum(status == "pass" for status, _ in judged["plain"].values()) >= 18
