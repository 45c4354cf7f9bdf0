from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, bad, expect, facts, resumed, saved

from lora_probe_callbacks.checks.checkpoints.saved_adapter import CHECK, judge

SEEN = (3, 30)
WHERE = "the adapter 'default' in out/adapter.safetensors"


def told(status: str, *words: str, of: dict[str, Any], slots: Any = ALL, **verdict: Any) -> None:
    """One file, changed; the verdict on it as a whole."""
    if status in ("pass", "skipped"):
        slots = ()
    expect(judge(facts(saves=(saved(**of),))), status, *words, slots=slots, seen=SEEN, **verdict)


def test_file_that_holds_the_live_values_passes() -> None:
    told("pass", of={})
    assert not bad(facts(saves=(saved(),)))
    assert CHECK.judge(facts()).status == "pending"


# --- whole models ---------------------------------------------------------------------------------


def test_whole_model_under_wrapped_names_fails() -> None:
    told(
        "fail",
        "out/adapter.safetensors is a model for from_pretrained under the names of a wrapped one: a load takes none",
        of={"form": "model", "wrapped": ("a.base_layer", "b.base_layer", "c.base_layer")},
        cause="wrapped model",
        got="3 names such as a.base_layer, b.base_layer and 1 more",
        expected="an adapter of PEFT, or a merged model",
        fix="merge_and_unload() before the whole model is saved",
    )


def test_whole_model_without_the_adapter_fails() -> None:
    told(
        "fail",
        "out/adapter.safetensors is the base model without the adapter 'default'",
        of={"form": "model", "values": None},
        cause="base model",
        got="adapted weights equal to the base's",
        expected="the adapter merged into them",
        fix="save the model that it returns",
    )


# --- names and shapes -----------------------------------------------------------------------------


def test_tensors_without_elements_fail() -> None:
    told(
        "fail",
        f"{WHERE} has no elements in 2 of its 4 tensors",
        of={"empty": ("x", "y"), "missing": ("z",)},
        cause="empty",
        got="shape [0]: x, y",
        expected="whole tensors",
        fix="gather the parameters before saving",
    )


def test_names_of_a_wrapper_fail() -> None:
    told(
        "fail",
        f"{WHERE} stands under the names of a wrapper, which no other model has: _orig_mod.x and 1 more",
        of={"wrapped": ("_orig_mod.x", "_orig_mod.y"), "missing": ("x", "y")},
        cause="wrapper",
        got="2 names with the name of a wrapper in them",
        expected="names as PEFT writes them",
        fix="save the module inside",
    )


@pytest.mark.parametrize(
    ("foreign", "got"), [((), "3 tensors of it"), (("p", "q"), "3 tensors of it, and p and 1 more")]
)
def test_missing_tensors_fail(foreign: tuple[str, ...], got: str) -> None:
    told(
        "fail",
        f"{WHERE} lacks 1 of its 4 tensors: x",
        of={"missing": ("x",), "foreign": foreign, "shapes": (("y", "[1]", "[2]"),)},
        cause="missing",
        got=got,
        expected="4",
    )


def test_other_shapes_fail() -> None:
    told(
        "fail",
        f"{WHERE} has other shapes than the live one: x [8, 4], live [4, 4]",
        of={"shapes": (("x", "[8, 4]", "[4, 4]"), ("y", "[1]", "[2]")), "values": "unrelated"},
        cause="shape",
        got="2 other shapes",
        expected="4 equal ones",
    )


def test_converted_adapter_is_not_compared() -> None:
    words = "converted to plain LoRA of twice the rank: other values by design"
    told("skipped", words, of={"converted": True, "shapes": (("x", "[8]", "[4]"),), "values": "unrelated"})


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "cause", "words", "got", "expected"),
    [
        ("untrained", "untrained", "every B in it is zero", "every B exactly 0", "the B of the trained adapter"),
        (
            "start",
            "start",
            "it is the adapter as it was when training began",
            "the values of the start",
            "those of now",
        ),
        (
            "previous",
            "stale",
            "it has not changed since the last save, and the adapter has",
            "the values of the last save",
            "those of now",
        ),
        (
            "unrelated",
            "unrelated",
            "its values have nothing in common with the trained ones",
            "unrelated values",
            "the live ones",
        ),
        (
            "not finite",
            "not finite",
            "it holds values that are not finite",
            "NaN or infinity",
            "the live, finite values",
        ),
    ],
)
def test_other_values_fail(values: str, cause: str, words: str, got: str, expected: str) -> None:
    told(
        "fail",
        f"{WHERE} is not the trained one: {words}",
        of={"values": values, "apart": 1.2345},
        cause=cause,
        got=f"{got} (relative distance 1.2)",
        expected=expected,
    )
    told("skipped", "explained by LP803: no step was made yet", of={"values": values, "before_steps": True})


@pytest.mark.parametrize("before_steps", [False, True])
def test_some_tensors_of_another_time_fail(before_steps: bool) -> None:
    told(
        "fail",
        f"{WHERE} differs from the live one in 2 of its 4 tensors, by 0.25 of the norm of all: x, y",
        of={"values": "partly", "differing": ("x", "y"), "before_steps": before_steps, "apart": 0.25},
        cause="partly",
        got="2 tensors with other values",
        expected="the values of all as they were when it was saved",
    )


@pytest.mark.parametrize("values", ["related", "fresh"])
def test_values_that_point_the_same_way_are_not_judged(values: str) -> None:
    told("skipped", "differ from the live ones by 12.5% of their norm", of={"values": values, "apart": 0.125})
    told("skipped", "explained by LP803", of={"values": values, "before_steps": True})


FAR = {"apart": 0.001, "farthest": (("a", 0.002), ("b", 0.001))}


@pytest.mark.parametrize("values", ["related", "fresh"])
def test_who_asks_is_told_by_how_much_and_where(values: str) -> None:
    told(
        "fail",
        f"{WHERE} is not the live one: its values differ by 0.001 of their norm in 4 of 4 tensors, ",
        "most in a by 0.002, b by 0.001",
        of={"values": values, "asked": True, **FAR},
        cause="apart",
        got="relative distance 0.001",
        expected="the live values, or these rounded to the type of the file",
        fix="if the file should hold an average over steps or another step nothing is wrong with it; else save",
    )


def test_who_asks_is_told_what_explains_values_that_are_near() -> None:
    told(
        "warn",
        f"{WHERE} is not the live one",
        of={"values": "related", "asked": True, "near": "another rounding to bfloat16", **FAR},
        cause="near",
        got="relative distance 0.001",
        expected="the live values, or these rounded to the type of the file",
        fix="another rounding to bfloat16 explains it",
    )


def test_file_of_another_step_says_how_far_it_is() -> None:
    old = {"values": "related", "asked": True, "why_no_values": "the file is older than the last step", **FAR}
    told("skipped", "the file is older than the last step; it differs from it by 0.001 of its norm", of=old)


def test_rounded_values_pass_and_say_so() -> None:
    verdict = judge(facts(saves=(saved(rounded="bfloat16"),)))
    assert (verdict.status, verdict.message) == ("pass", f"{WHERE} holds the live values rounded to bfloat16")


def test_values_that_were_not_compared_are_said() -> None:
    words = "out/adapter.safetensors: the file is of another rank; its names and shapes are right"
    told("skipped", words, of={"values": None, "why_no_values": "the file is of another rank", "foreign": ("p",)})


def test_foreign_names_warn() -> None:
    told(
        "warn",
        f"{WHERE} holds 3 tensors that stand for nothing in the model: p, q and 1 more",
        of={"foreign": ("p", "q", "r")},
        slots=(),
        cause="foreign",
        got="3 names that the model does not have",
        expected="0",
        fix="compare the names with model.state_dict()",
    )


# --- neighbours -----------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [{"other": "second"}, {"settings": (("r", "8", "4"),)}])
def test_another_adapter_is_left_to_its_own_check(of: dict[str, Any]) -> None:
    told("skipped", "explained by LP802", of={**of, "values": "unrelated"})
    assert list(bad(facts(saves=(saved(**of, values="unrelated"),)))) == ["LP802"]


def test_adapter_that_was_not_restored_is_left_to_its_own_check() -> None:
    what = facts(saves=(saved(before_steps=True, values="unrelated"),), restored=resumed())
    assert list(bad(what)) == ["LP803"]


def test_damaged_file_is_left_to_its_own_check() -> None:
    assert list(bad(facts(saves=(saved(unreadable="cut short", final=True, missing=("x",)),)))) == ["LP807"]


def test_orphan_in_the_optimizer_explains_a_file_of_the_start() -> None:
    what = facts(saves=(saved(values="start"),), replaced=(0, 1, 2, 3), foreign_in_optimizer=4)
    assert list(bad(what)) == ["LP202"]
