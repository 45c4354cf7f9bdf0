from __future__ import annotations

from typing import Any

import pytest
from facts import STILL, bad, facts

from lora_probe_callbacks.checks.erased import judge
from lora_probe_callbacks.observe.facts import (
    UpdateFact,
)

ERASED = UpdateFact(start=1.0, moved=1.0, size=1.0, norm=0.01, finite=True)


def test_every_b_erased_fails() -> None:
    verdict = bad(facts(updates=[STILL, ERASED, STILL, ERASED]))["LP407"]
    assert verdict.slots == {1, 3}
    assert verdict.of_update


@pytest.mark.parametrize(
    ("update", "slot", "status"),
    [
        (ERASED._replace(norm=0.1), {}, "pass"),  # a tenth is left
        (ERASED._replace(finite=False), {}, "pass"),  # LP501
        (ERASED._replace(start=0.0), {}, "pending"),  # there was nothing to erase
        (ERASED, {"learning_rate": 0.02}, "pass"),  # 10 * 0.02 * sqrt(32) is above 1
        (ERASED, {"learning_rate": 0.017}, "fail"),
        (ERASED, {"learning_rate": 0.01, "weight_decay": 50.0}, "pass"),
        (ERASED, {"learning_rate": None}, "pass"),
        (ERASED, {"frozen_by_intent": True}, "pending"),
    ],
)
def test_change_that_something_explains_passes(update: UpdateFact, slot: dict[str, Any], status: str) -> None:
    assert judge(facts(updates=[STILL, update] * 2, slot=slot)).status == status


def test_one_layer_erased_of_two_passes() -> None:
    assert judge(facts(updates=[STILL, ERASED, STILL, STILL])).status == "pass"
    assert judge(facts(update=None)).status == "pending"
