from __future__ import annotations

from typing import Any

import pytest
from facts import facts

from lora_probe_callbacks.checks.untrained_token import judge
from lora_probe_callbacks.observe.facts import (
    Coverage,
    Facts,
    TokenTable,
)


def tables(*untrained: tuple[int, ...], rows: int = 8) -> Facts:
    sides: tuple[Any, Any] = ("input", "output")
    found = tuple(TokenTable(s, s, rows, u) for s, u in zip(sides, untrained, strict=False))
    return facts(new_tokens=(6, 7), coverage=Coverage(tokens=found))


@pytest.mark.parametrize(
    ("what", "status", "cause"),
    [
        (facts(), "skipped", ""),
        (facts(new_tokens=(6,)), "pending", ""),
        (facts(new_tokens=(6,), coverage=Coverage()), "skipped", ""),
        (tables((), ()), "pass", ""),
        (tables((), (6, 7)), "pass", ""),  # an untied head may stay
        (tables((6, 7), (6, 7)), "fail", "frozen"),
        (tables((7,), (6, 7)), "fail", "frozen"),
        (tables((6, 7), ()), "warn", "input"),
        (tables((6, 7)), "fail", "frozen"),
        (tables((7,), (7,), rows=7), "fail", "beyond"),
    ],
)
def test_new_tokens(what: Facts, status: str, cause: str) -> None:
    verdict = judge(what)
    assert (verdict.status, verdict.cause) == (status, cause)
