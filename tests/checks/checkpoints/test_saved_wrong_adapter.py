from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, bad, expect, facts, saved

from lora_probe_callbacks.checks.checkpoints.saved_wrong_adapter import CHECK, judge

SEEN = (3, 30)


def of(**changes: Any) -> Any:
    return judge(facts(saves=(saved(**changes),)))


def test_values_of_another_adapter_fail() -> None:
    verdict = of(other="second", settings=(("r", "8", "4"),))
    expect(
        verdict,
        "fail",
        "out/adapter.safetensors holds the adapter 'second', and 'default' is the one that trains",
        slots=ALL,
        cause="adapter",
        got="the values of 'second'",
        expected="those of 'default'",
        fix="save_pretrained(path, selected_adapters=['default']), which writes it to path/default",
        seen=SEEN,
    )


def test_other_settings_fail() -> None:
    expect(
        of(settings=(("r", "8", "4"), ("lora_alpha", "16", "32"))),
        "fail",
        "r of the adapter 'default' is 8 in out/adapter.safetensors and 4 in the model that trains",
        slots=ALL,
        cause="settings",
        got="r 8, lora_alpha 16",
        expected="r 4, lora_alpha 32",
        fix="set r and lora_alpha in the LoraConfig before the adapter is made",
        seen=SEEN,
    )


def test_own_adapter_passes() -> None:
    expect(of(), "pass", seen=SEEN)
    assert CHECK.judge(facts()).status == "pending"


@pytest.mark.parametrize("form", ["state", "model"])
def test_checkpoint_of_a_whole_module_names_the_adapter(form: str) -> None:
    assert of(form=form, other="second").status == "skipped"


@pytest.mark.parametrize("changes", [{"missing": ("x",)}, {"empty": ("x",)}])
def test_incomplete_file_is_left_to_its_own_check(changes: dict[str, Any]) -> None:
    expect(of(**changes), "skipped", "explained by LP801", seen=SEEN)
    assert list(bad(facts(saves=(saved(**changes),)))) == ["LP801"]


def test_wrong_adapter_is_told_once() -> None:
    assert list(bad(facts(saves=(saved(other="second"),)))) == ["LP802"]


def test_scaling_that_was_changed_explains_other_settings() -> None:
    what = facts(saves=(saved(settings=(("alpha", "8", "16"),)),), unit={"scaling": 4.0, "natural": 2.0})
    assert list(bad(what)) == ["LP502"]
