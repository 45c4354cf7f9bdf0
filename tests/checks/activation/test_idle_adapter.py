from __future__ import annotations

import pytest
from support.facts import bad, expect, facts, other

from lora_probe_callbacks.checks.activation.idle_adapter import CHECK

IDLE = {"was_active": False, "ever_changed": False}


def test_adapter_that_nobody_uses_warns() -> None:
    what = facts(others=(other("new", **IDLE), other("old", **IDLE)))
    assert list(bad(what)) == ["LP108"]
    expect(
        CHECK.judge(what),
        "warn",
        "adapter 'new', 'old' was never active and never moved; ['default'] is what trains",
        cause="new,old",
        got="idle adapters ['new', 'old']",
        expected="every adapter trained, used or declared",
        fix="call set_adapter('new') before training; if not, pass reference_adapters=('new',) or delete it",
    )


@pytest.mark.parametrize(
    ("step", "moment", "status"),
    [(2, "step", "pending"), (3, "step", "warn"), (0, "end", "warn"), (0, "start", "pending")],
)
def test_four_steps_are_waited_for(step: int, moment: str, status: str) -> None:
    verdict = CHECK.judge(facts(others=(other("new", **IDLE),), step=step, moment=moment))
    assert verdict.status == status
    if status == "pending":
        expect(verdict, "pending", "adapters ['new'] were not used yet")


@pytest.mark.parametrize(
    "used",
    [
        {"declared": "reference"},
        {"declared": "lagged"},
        {"was_active": True},
        {"active_now": True},
        {"ever_changed": True},
    ],
)
def test_adapter_that_is_declared_or_used_passes(used: dict[str, object]) -> None:
    expect(CHECK.judge(facts(others=(other("new", **{**IDLE, **used}),))), "pass")


def test_no_other_adapter_passes() -> None:
    expect(CHECK.judge(facts()), "pass")


def test_expected_adapter_that_is_inactive_is_left_to_its_own_check() -> None:
    assert list(bad(facts(modes=["inactive"] * 2, others=(other(),)))) == ["LP101"]
