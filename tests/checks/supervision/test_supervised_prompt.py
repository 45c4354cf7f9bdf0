from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, facts
from support.supervision import supervised

from lora_probe_callbacks.checks.supervision.supervised_prompt import CHECK, judge


@pytest.mark.parametrize(
    ("columns", "status"),
    [({}, "pass"), ({"masked": [0, 1, 0, 0]}, "fail"), ({"masked": 3, "causal": False}, "pending")],
)
def test_supervised_prompt(columns: dict[str, Any], status: str) -> None:
    assert CHECK.code == "LP003"
    assert judge(supervised(**columns)).status == status


def test_it_says_where() -> None:
    verdict = judge(supervised(masked=[4, 2, 0, 0]))
    assert "6 of the 24 tokens that this step trains on" in verdict.message
    assert verdict.evidence["got"] == "a gradient at 6 positions that the mask leaves out, in 2 of 4 rows"
    assert verdict.slots == ALL


def test_nothing_to_look_at_is_no_pass() -> None:
    assert judge(facts()).status == "pending"
