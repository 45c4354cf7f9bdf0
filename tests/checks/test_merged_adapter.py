from __future__ import annotations

import dataclasses

from facts import GRADIENT, NONE, bad, facts

MISSING = {"missing": 1, "had_gradient": False, "had_signal": False}


def test_merged_adapter_is_the_one_finding_of_a_merged_step() -> None:
    """Frozen-looking gradients, an unreachable graph and an unmoved adapter are its consequences."""
    assert list(bad(facts(modes=["merged"] * 2, gradients=[NONE] * 4, history=MISSING))) == ["LP103"]


def test_a_part_that_is_merged_is_left_to_the_check_of_irregular_layers() -> None:
    assert list(bad(facts(modes=["merged", "active"]))) == ["LP106"]


def test_merged_beside_a_modules_to_save_copy_is_merged_not_irregular() -> None:
    what = facts(modes=["merged", "active"], gradients=[NONE] * 2 + [GRADIENT] * 2)
    copy = dataclasses.replace(what.units[1], lora=False)
    assert list(bad(dataclasses.replace(what, units=(what.units[0], copy)))) == ["LP103"]


def test_active_adapter_passes() -> None:
    assert not bad(facts())
