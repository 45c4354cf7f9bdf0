from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, bad, expect, facts, resumed, saved

from lora_probe_callbacks.checks.checkpoints.restored_adapter import CHECK, judge

FIX = "set_peft_model_state_dict and load_state_dict(strict=False) name what they did not find"


def of(**changes: Any) -> Any:
    return judge(facts(restored=resumed(**changes)))


def test_fresh_adapter_in_a_resumed_run_fails() -> None:
    what = facts(restored=resumed(fresh=True, differing=(0,), known=frozenset()))
    expect(
        judge(what),
        "fail",
        "the run goes on from last.ckpt, and its adapter is fresh: every B is exactly zero, "
        "and was not when it was saved",
        slots=ALL,
        cause="fresh",
        got="B = 0 in all layers",
        expected="the adapter that was saved",
        fix=FIX,
    )
    assert list(bad(what)) == ["LP803"]


def test_other_values_fail() -> None:
    expect(
        of(differing=(1, 3), unknown=2),
        "fail",
        "the run goes on from last.ckpt, and 2 of 4 adapter tensors are not as they were saved: "
        "layer.0.lora_B, layer.1.lora_B",
        slots=[1, 3],
        cause="values",
        got="2 tensors with other values",
        expected="the values of the checkpoint",
        fix=FIX,
    )


def test_names_without_a_place_fail() -> None:
    expect(
        of(unknown=2),
        "fail",
        "2 adapter tensors in last.ckpt have no place in this model",
        slots=ALL,
        cause="names",
        got="4 tensors found again",
        expected="6",
        fix="build the model and the adapter as they were when the checkpoint was written",
    )


def test_adapter_that_was_saved_passes() -> None:
    expect(of(), "pass")
    expect(CHECK.judge(facts()), "pending", "no saved state was restored")


def test_names_that_are_all_unknown_are_skipped() -> None:
    expect(
        of(known=frozenset(), unknown=4), "skipped", "no tensor of the adapter in last.ckpt has a name in this model"
    )


# --- a file that was restored by hand -------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("fresh", "the live adapter is fresh: every B is exactly zero, and in the file it is not"),
        ("untrained", "every B in the file is zero, and in the model it is not"),
        ("unrelated", "no step was made yet, and their values differ"),
        ("related", "no step was made yet, and their values differ"),
        ("start", "no step was made yet, and their values differ"),
    ],
)
def test_file_that_is_not_in_the_model_fails(values: str, words: str) -> None:
    what = facts(saves=(saved(before_steps=True, values=values, apart=0.1234),))
    expect(
        judge(what),
        "fail",
        f"the adapter 'default' in the model is not the one in out/adapter.safetensors: {words}",
        slots=ALL,
        cause="file",
        got="relative distance 0.12",
        expected="the values of the file",
        fix=FIX,
    )
    assert list(bad(what)) == ["LP803"]


def test_distance_from_zero_is_said_in_words() -> None:
    what = facts(saves=(saved(before_steps=True, values="fresh", apart=float("inf")),))
    assert judge(what).evidence["got"] == "B = 0 in the model"


def test_file_that_is_in_the_model_passes() -> None:
    expect(judge(facts(saves=(saved(before_steps=True),))), "pass")


@pytest.mark.parametrize("values", ["fresh", "unrelated", "equal"])
def test_files_that_were_written_in_training_are_left_to_their_own_check(values: str) -> None:
    expect(judge(facts(saves=(saved(values=values),))), "pending", "no saved state was restored")


def test_file_has_the_say_before_the_fingerprint() -> None:
    what = facts(saves=(saved(), saved(before_steps=True, values="fresh")), restored=resumed())
    assert judge(what).cause == "file"


def test_lost_optimizer_state_is_left_to_its_own_check() -> None:
    assert list(bad(facts(restored=resumed(lost=(0,))))) == ["LP804"]
