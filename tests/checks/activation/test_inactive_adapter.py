from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.facts import ALL, NONE, bad, estimator, expect, facts

from lora_probe_callbacks.checks.activation.inactive_adapter import CHECK
from lora_probe_callbacks.facts import Facts

MISSING = {"missing": 1, "had_gradient": False, "had_signal": False}


def test_expected_adapter_that_is_not_active_fails() -> None:
    what = facts(modes=["inactive"] * 2, gradients=[NONE] * 4, history=MISSING, forward={"active": ("old",)})
    assert list(bad(what)) == ["LP101"]
    expect(
        CHECK.judge(what),
        "fail",
        "adapter 'default' was not active in the training forward; ['old'] was",
        slots=ALL,
        got="active adapters ['old'] in model",
        expected="active adapters ['default']",
        fix="call model.set_adapter('default')",
    )


def test_no_forward_is_pending_with_its_reason() -> None:
    expect(CHECK.judge(facts(forwards=())), "pending", "no training forward was seen")
    expect(CHECK.judge(facts(forwards=(), unobservable="it is compiled")), "pending", "it is compiled")


def test_activated_after_the_forward_is_left_to_late_activation() -> None:
    what = dataclasses.replace(facts(modes=["inactive"] * 2), modes=("active", "active"))
    expect(CHECK.judge(what), "pass")
    assert list(bad(what)) == ["LP105"]
    assert CHECK.judge(dataclasses.replace(what, modes=("active", "inactive"))).status == "fail"


def two(**changes: Any) -> Facts:
    """Two expected adapters, the second of which is not active."""
    what = facts(modes=["active", "inactive"], expected=("default", "second"), **changes)
    units = (what.units[0], dataclasses.replace(what.units[1], adapter="second"))
    return dataclasses.replace(what, units=units)


def test_adapters_that_take_turns_pass() -> None:
    expect(CHECK.judge(two()), "pass")
    expect(CHECK.judge(two(at={2: {"had_gradient": False}})), "pass")  # A has none while B is zero


@pytest.mark.parametrize("missing", [3, 4])
def test_adapter_whose_turn_never_comes_warns_after_four_steps(missing: int) -> None:
    never = {"missing": missing, "had_gradient": False}
    verdict = CHECK.judge(two(at={2: never, 3: never}))
    if missing < 4:
        expect(verdict, "pending", "['second'] not active yet", "they may take turns")
        return
    expect(
        verdict,
        "warn",
        "adapter 'second' was not active in any of 4 probed steps",
        slots=[2, 3],
        got="active adapters ['default']",
        expected="each of ['default', 'second'] in its turn",
        fix="if the turn of 'second' is still to come nothing is wrong",
    )


def test_one_tensor_that_is_not_missing_long_enough_is_pending() -> None:
    what = two(at={2: {"missing": 4, "had_gradient": False}, 3: {"missing": 3, "had_gradient": False}})
    assert CHECK.judge(what).status == "pending"


def test_layers_inactive_in_part_are_left_to_irregular_layers() -> None:
    expect(CHECK.judge(facts(modes=["inactive", "active"])), "pass")


def test_estimators_are_asked_too() -> None:
    inactive = facts(modes=["inactive"] * 2)
    verdict = CHECK.judge(facts(estimators=(estimator(forwards=inactive.forwards, modes=inactive.modes),)))
    assert (verdict.status, verdict.cause, verdict.seen) == ("fail", "S", (4, 40))


def test_active_adapter_passes() -> None:
    expect(CHECK.judge(facts()), "pass")
