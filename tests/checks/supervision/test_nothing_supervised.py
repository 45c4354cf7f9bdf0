from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, bad, facts
from support.supervision import supervised

from lora_probe_callbacks.checks.supervision.nothing_supervised import CHECK, judge

NONE: dict[str, Any] = {"supervised": 0, "meant": 0, "prompt": 12, "stops": 0}
UNLABELLED: dict[str, Any] = {"meant": -1}


def test_code() -> None:
    assert (CHECK.code, CHECK.needs) == ("LP001", ("supervision",))


@pytest.mark.parametrize(
    ("columns", "totals", "status"),
    [
        ({}, {}, "pass"),
        (NONE, {"empty_steps": 1, "empty_in_a_row": 1}, "warn"),
        (NONE, {"empty_steps": 3, "empty_in_a_row": 3}, "warn"),
        (NONE, {"empty_steps": 4, "empty_in_a_row": 4}, "fail"),
        (NONE, {"steps": 8, "empty_steps": 4, "empty_in_a_row": 1}, "fail"),
        (NONE, {"steps": 7, "empty_steps": 6, "empty_in_a_row": 1}, "warn"),  # too few to speak of half of them
        (NONE, {"steps": 100, "empty_steps": 2, "empty_in_a_row": 1}, "warn"),
        # Rows
        ({"supervised": [0, 6, 6, 6], "meant": [0, 6, 6, 6]}, {"rows": 40, "empty_rows": 20}, "pass"),
        ({"supervised": [0, 6, 6, 6], "meant": [0, 6, 6, 6]}, {"rows": 40, "empty_rows": 21}, "warn"),
        ({"supervised": [0, 6, 6, 6], "meant": [0, 6, 6, 6]}, {"rows": 15, "empty_rows": 14}, "pass"),
        # Without labels: an advantage of 0 looks the same
        (UNLABELLED, {}, "pass"),
        ({**NONE, **UNLABELLED}, {"steps": 5, "empty_steps": 5}, "pending"),
        ({**NONE, **UNLABELLED}, {"steps": 7, "empty_steps": 6}, "pass"),
        ({**NONE, **UNLABELLED}, {"steps": 8, "empty_steps": 4}, "pass"),
        ({**NONE, **UNLABELLED}, {"steps": 8, "empty_steps": 5}, "warn"),
    ],
)
def test_nothing_supervised(columns: dict[str, Any], totals: dict[str, int], status: str) -> None:
    assert judge(supervised(totals=totals, **columns)).status == status


def test_confident_answers_without_a_gradient_are_no_empty_rows() -> None:
    assert judge(supervised(supervised=0)).status == "pass"  # the labels say that they were meant


def test_nothing_to_look_at_is_no_pass() -> None:
    verdict = judge(facts())
    assert (verdict.status, verdict.nothing_new) == ("pending", True)


@pytest.mark.parametrize(("real", "cause"), [(12, "the answer was cut off"), (8, "print a row's labels")])
def test_it_says_whether_the_answers_were_cut_off(real: int, cause: str) -> None:
    verdict = judge(supervised(**NONE, real=real, totals={"empty_steps": 4, "empty_in_a_row": 4}))
    assert verdict.slots == ALL
    assert cause in verdict.fix
    assert verdict.evidence["got"] == "4 of 5 probed steps without a supervised token"
    rows = supervised(supervised=[0, 6, 6, 6], meant=[0, 6, 6, 6])
    few = {"rows": 40, "empty_rows": 30, "empty_full": 30 if real == 12 else 15}
    assert cause in judge(supervised(supervised=[0, 6, 6, 6], meant=[0, 6, 6, 6], totals=few)).fix
    assert judge(rows).status == "pass"


def test_it_explains_a_gradient_of_zero() -> None:
    zero = {"gradients": (0.0,) * 4, "history": {"zero": 4, "had_signal": False}}
    what = supervised(**NONE, totals={"empty_steps": 4, "empty_in_a_row": 4})
    assert "LP303" in bad(facts(**zero))
    merged = facts(supervision=what.supervision, supervision_totals=what.supervision_totals, **zero)
    assert list(bad(merged)) == ["LP001"]
