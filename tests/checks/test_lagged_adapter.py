from __future__ import annotations

from typing import Any

import pytest
from facts import facts

from lora_probe_callbacks.checks.lagged_adapter import judge
from lora_probe_callbacks.observe.facts import (
    OtherAdapter,
)


def teacher(**changes: Any) -> OtherAdapter:
    settings: dict[str, Any] = {
        "name": "teacher",
        "declared": "lagged",
        "tensors": 4,
        "trainable": 0,
        "owned": 0,
        "changed": (),
        "was_active": False,
        "ever_changed": False,
        "active_now": False,
    }
    return OtherAdapter(**{**settings, **changes})


@pytest.mark.parametrize(
    ("other", "step", "status"),
    [
        (teacher(declared=None, was_active=True), 4, "skipped"),
        (teacher(still=0), 4, "pass"),
        (teacher(still=0), 1, "pending"),
        (teacher(still=2, written=2), 4, "pending"),
        (teacher(still=3, written=3), 4, "fail"),
        (teacher(still=3, written=2), 4, "pending"),
        (teacher(still=2, half=True), 4, "pending"),
        (teacher(still=3, half=True), 4, "warn"),
        (teacher(still=16), 99, "pending"),
        (teacher(still=16), 100, "warn"),
        (teacher(still=15), 100, "pending"),
        (teacher(still=16, still_since=1), 100, "pending"),
    ],
)
def test_lagged_adapter(other: OtherAdapter, step: int, status: str) -> None:
    assert judge(facts(others=(other,), step=step)).status == status


def test_the_lagged_adapter_that_stands_is_named_beside_one_that_follows() -> None:
    others = (teacher(name="moves"), teacher(name="stands", still=5, written=5))
    assert "'stands'" in judge(facts(others=others)).message
