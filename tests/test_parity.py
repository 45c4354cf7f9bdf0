"""The three front doors say the same of the same run."""

from __future__ import annotations

import pytest
from doors import DOORS, watch_through
from recipes import RECIPES, Recipe, parameters

from lora_probe_callbacks import LoraProbeError


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
