from __future__ import annotations

import pytest
from support.facts import ALL, bad, expect, facts

from lora_probe_callbacks.checks.update.skipped_steps import CHECK

SCALED = {"scaler": True, "loss_scale": 1024.0}
OVERFLOW = "because the gradients are not finite"


@pytest.mark.parametrize("row", [3, 4])
def test_four_steps_in_a_row_warn(row: int) -> None:
    what = facts(skipped_in_a_row=row, **SCALED)
    if row < 4:
        words = "3 step(s) skipped in a row: the first steps of mixed precision may overflow"
        expect(CHECK.judge(what), "pending", words)
        return
    assert list(bad(what)) == ["LP406"]
    expect(
        CHECK.judge(what),
        "warn",
        f"4 steps in a row were skipped {OVERFLOW}",
        slots=ALL,
        got="4 steps skipped in a row, loss scale now 1024",
        expected="a step that is applied",
        fix="it fails when the scale is below 1 or after 16 steps",
    )


@pytest.mark.parametrize(
    ("row", "scale", "status"), [(15, 1.0, "warn"), (16, 1.0, "fail"), (4, 0.99, "fail"), (15, None, "warn")]
)
def test_what_no_smaller_scale_cures_fails(row: int, scale: float | None, status: str) -> None:
    verdict = CHECK.judge(facts(skipped_in_a_row=row, scaler=True, loss_scale=scale))
    assert verdict.status == status
    told = "" if scale is None else f", loss scale now {scale:g}"
    if status == "fail":
        words = f"{row} steps in a row were skipped {OVERFLOW}: nothing is learned"
        got = f"{row} steps skipped in a row{told}"
        expect(verdict, "fail", words, slots=ALL, got=got, expected="a step that is applied")
    else:
        assert verdict.evidence["got"] == f"{row} steps skipped in a row{told}"


def test_nothing_finite_since_the_start_fails() -> None:
    never = facts(skipped_in_a_row=4, ever_stepped=False, all_non_finite=True, **SCALED)
    assert CHECK.judge(never).status == "fail"
    assert CHECK.judge(facts(skipped_in_a_row=4, all_non_finite=True, **SCALED)).status == "warn"
    assert CHECK.judge(facts(skipped_in_a_row=4, ever_stepped=False, **SCALED)).status == "warn"


def test_without_a_scaler_somebody_does_not_step() -> None:
    words = ": gradients were made, and the optimizer that owns the adapter did not step"
    verdict = CHECK.judge(facts(skipped_in_a_row=5))
    assert (verdict.status, words in verdict.message) == ("warn", True)
    assert verdict.evidence["got"] == "5 steps skipped in a row"
    certain = CHECK.judge(facts(skipped_in_a_row=16))
    assert (certain.status, "calling step()" in certain.fix) == ("fail", True)
    assert not CHECK.judge(facts(skipped_in_a_row=16, scaler=True, loss_scale=1.0)).fix


def test_optimizer_that_never_stepped_is_left_to_not_moved() -> None:
    what = facts(skipped_in_a_row=20, ever_stepped=False, update=None)
    expect(CHECK.judge(what), "pending", "20 step(s) made gradients and no optimizer has stepped yet")
    assert list(bad(what)) == ["LP401"]


def test_nothing_was_skipped() -> None:
    expect(CHECK.judge(facts()), "pass")
    expect(CHECK.judge(facts(moment="end")), "pass")
    expect(CHECK.judge(facts(ever_stepped=False)), "pass")
    expect(CHECK.judge(facts(moment="start", ever_stepped=False)), "pending", "no step was seen yet")
