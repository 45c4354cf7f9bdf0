from __future__ import annotations

import pytest
from support.facts import ALL, facts

from lora_probe_callbacks.checks.reachability.kept_gradient import CHECK, judge
from lora_probe_callbacks.facts import Accumulation

KEPT, CLEAN = Accumulation(passes=1, old=4), Accumulation(passes=1)


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ((), "pending"),
        ((CLEAN,), "pass"),
        ((KEPT,), "pending"),  # left before the run began
        ((KEPT, CLEAN), "pass"),
        ((CLEAN, KEPT), "pending"),
        ((KEPT, KEPT), "fail"),
    ],
)
def test_kept_gradient(steps: tuple[Accumulation, ...], status: str) -> None:
    assert CHECK.code == "LP310"
    assert judge(facts(accumulated=steps)).status == status


def test_it_says_of_how_many() -> None:
    verdict = judge(facts(accumulated=(CLEAN, KEPT, KEPT)))
    assert "of 4 adapter tensors are never cleared" in verdict.message
    assert "in 2 steps in a row" in str(verdict.evidence["got"])
    assert verdict.slots == ALL
