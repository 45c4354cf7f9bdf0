from __future__ import annotations

from typing import Any

import pytest
from support.facts import facts
from support.supervision import supervised

from lora_probe_callbacks.checks.supervision.supervised_padding import CHECK, judge


@pytest.mark.parametrize(
    ("columns", "status"),
    [
        ({}, "pass"),
        ({"padding": [0, 1, 1, 1]}, "pass"),  # the first pad stands for the end
        ({"padding": [0, 2, 0, 0]}, "warn"),
        ({"padding": 5, "causal": False}, "pending"),
    ],
)
def test_supervised_padding(columns: dict[str, Any], status: str) -> None:
    assert CHECK.code == "LP002"
    assert judge(supervised(**columns)).status == status


def test_it_says_how_many() -> None:
    verdict = judge(supervised(padding=[0, 5, 3, 0]))
    assert verdict.message == "padding is supervised: 8 of the 24 tokens that this step trains on are padding"
    assert str(verdict.evidence["got"]).startswith("2 of 4 rows")


def test_nothing_to_look_at_is_no_pass() -> None:
    assert judge(facts()).status == "pending"
