from __future__ import annotations

from typing import Any

import pytest
from support.facts import facts
from support.supervision import supervised

from lora_probe_callbacks.checks.supervision.missing_stop_token import CHECK, judge

STOP: dict[str, Any] = {"stop_tokens": (2,)}
KNOWN: dict[str, Any] = {**STOP, "has_tokenizer": True}
NEVER = {"stops": 0}


@pytest.mark.parametrize(
    ("columns", "totals", "status"),
    [
        (STOP, {"stops": 1}, "pass"),
        (STOP, {"stops": 1, "cut_stops": 100}, "pass"),
        (STOP, {**NEVER, "cut_stops": 7}, "pending"),
        (STOP, {**NEVER, "cut_stops": 8}, "warn"),
        (KNOWN, {**NEVER, "prompts": 32, "endings": 32}, "warn"),
        (KNOWN, {**NEVER, "prompts": 31, "endings": 40}, "pending"),
        (KNOWN, {**NEVER, "prompts": 40, "endings": 31}, "pending"),  # what fills its batch may have been cut
        (STOP, {**NEVER, "prompts": 99, "endings": 99}, "pending"),  # only a configuration tells of a stop token
        ({}, {**NEVER, "cut_stops": 99}, "pending"),
        ({**KNOWN, "causal": False}, {**NEVER, "cut_stops": 99}, "pending"),
    ],
)
def test_missing_stop_token(columns: dict[str, Any], totals: dict[str, int], status: str) -> None:
    assert CHECK.code == "LP004"
    assert judge(supervised(totals=totals, **columns)).status == status


def test_it_names_the_token() -> None:
    verdict = judge(supervised(totals={**NEVER, "cut_stops": 9}, **STOP))
    assert verdict.message.startswith("a stop token (such as token 2) stands behind 9 answers, and is a target of none")
    never = judge(supervised(totals={**NEVER, "prompts": 40, "endings": 33}, **KNOWN))
    assert never.message.startswith("none of the 33 answers seen so far ends with a stop token (such as token 2)")


def test_nothing_to_look_at_is_no_pass() -> None:
    assert judge(facts()).status == "pending"
