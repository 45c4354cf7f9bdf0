from __future__ import annotations

from typing import Any

import pytest
from support.facts import bad, expect, facts, other

from lora_probe_callbacks.checks.update.lagged_adapter import CHECK, judge
from lora_probe_callbacks.facts import (
    OtherAdapter,
)


def teacher(**changes: Any) -> OtherAdapter:
    healthy = {"name": "teacher", "declared": "lagged", "was_active": False, "ever_changed": False}
    return other(**{**healthy, **changes})


@pytest.mark.parametrize(
    ("lagged", "step", "status"),
    [
        (teacher(declared=None, was_active=True), 4, "skipped"),
        (teacher(declared="reference", still=9, written=9), 4, "skipped"),
        (teacher(still=0), 4, "pass"),
        (teacher(still=0), 3, "pending"),
        (teacher(still=0, ever_changed=True), 1, "pass"),
        (teacher(still=1), 1, "pending"),
        (teacher(still=2, written=2), 4, "pending"),
        (teacher(still=3, written=3), 4, "fail"),
        (teacher(still=3, written=2), 4, "pending"),
        (teacher(still=2, half=True), 4, "pending"),
        (teacher(still=3, half=True), 4, "warn"),
        (teacher(still=16), 99, "pending"),
        (teacher(still=16), 100, "warn"),
        (teacher(still=15), 100, "pending"),
        (teacher(still=16, still_since=1), 100, "pending"),
        (teacher(still=16, still_since=1), 101, "warn"),
    ],
)
def test_lagged_adapter(lagged: OtherAdapter, step: int, status: str) -> None:
    assert judge(facts(others=(lagged,), step=step)).status == status


def test_teacher_that_is_written_to_and_stands_fails() -> None:
    what = facts(others=(teacher(still=5, written=4),))
    expect(
        judge(what),
        "fail",
        "lagged adapter 'teacher' does not follow: it was written to in 4 probed steps and not one bit changed",
        cause="teacher",
        got="0 of 4 tensors changed in 5 probed steps in a row",
        expected="a step towards ['default'], which moved in each of them",
    )
    assert list(bad(what)) == ["LP408"]


def test_teacher_in_16_bits_that_stands_warns() -> None:
    expect(
        judge(facts(others=(teacher(still=3, half=True),))),
        "warn",
        "lagged adapter 'teacher' stands still: not one bit changed in 3 probed steps",
        cause="teacher",
        got="0 of 4 tensors changed in 3 probed steps in a row, in 16 bits",
        expected="a step towards ['default'], which moved in each of them",
        fix="and keep it in float32: a step below half a last digit is rounded away",
    )


def test_teacher_that_nobody_updates_is_warned_of_late() -> None:
    verdict = judge(facts(others=(teacher(still=16),), step=100))
    assert verdict.fix.endswith("else look whether anything updates it")
    assert "in 16 bits" not in str(verdict.evidence)


def test_the_lagged_adapter_that_stands_is_named_beside_one_that_follows() -> None:
    others = (teacher(name="moves"), teacher(name="stands", still=5, written=5))
    assert judge(facts(others=others)).cause == "stands"
    others = (teacher(name="written", still=3, written=3), teacher(name="stands", still=9))
    assert judge(facts(others=others)).cause == "written"
    followed = (teacher(name="a", ever_changed=True), teacher(name="b"))
    assert judge(facts(others=followed, step=1)).status == "pass"


def test_what_cannot_be_judged_says_why() -> None:
    expect(CHECK.judge(facts()), "skipped", "no lagged adapter was declared")
    expect(judge(facts(others=(teacher(),), step=3)), "pending", "no update was seen yet")
    expect(judge(facts(others=(teacher(still=2),))), "pending", "'teacher' has not moved in 2 probed step(s)")


def test_copy_that_follows_other_tensors_fails() -> None:
    expect(
        judge(facts(others=(teacher(astray=("x", "y")),))),
        "fail",
        "lagged adapter 'teacher' follows other tensors: 2 of 4 move away from those of ['default'] in the same",
        "places: x, y",
        cause="teacher",
        got="2 tensors farther from the trained ones after every write",
        expected="a step towards ['default'], tensor by tensor",
        fix="pair the tensors by name",
    )


@pytest.mark.parametrize(
    ("behind", "half", "status"),
    [(2, True, "fail"), (1, True, "warn"), (1, False, "fail"), (4, True, "fail"), (0, True, "pass")],
)
def test_copy_of_which_a_part_stands_still(behind: int, half: bool, status: str) -> None:
    verdict = judge(facts(others=(teacher(behind=tuple("wxyz")[:behind], half=half, lost=0.875),)))
    assert verdict.status == status
    if behind:
        assert (
            f"{behind} of 4 tensors stand still while it is written to, 88% of what should move is lost"
            in verdict.message
        )
        assert ("float32" in verdict.fix) is half
        assert ("16 bits" in str(verdict.evidence["got"])) is half


def test_reference_that_moved_is_left_to_its_own_check() -> None:
    assert list(bad(facts(others=(other("ref", declared="reference", changed=("x",)),)))) == ["LP404"]
