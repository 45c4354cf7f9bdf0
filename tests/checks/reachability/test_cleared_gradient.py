from __future__ import annotations

import pytest
from support.facts import ALL, facts

from lora_probe_callbacks.checks.reachability.cleared_gradient import CHECK, judge
from lora_probe_callbacks.facts import Accumulation

CLEARED = Accumulation(passes=4, lost=3, aligned=1.0)
WHOLE = Accumulation(passes=4)


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ((), "pending"),
        ((Accumulation(),), "pending"),
        ((Accumulation(passes=1),), "pass"),
        ((WHOLE, WHOLE), "pass"),
        ((CLEARED,), "pending"),
        ((CLEARED, CLEARED), "fail"),
        ((CLEARED, WHOLE), "pass"),
        ((WHOLE, CLEARED), "pending"),
        ((Accumulation(4, 1, 0, 1.0), CLEARED), "pending"),  # a batch thrown away now and then
        ((Accumulation(4, 3, 0, 0.5),) * 2, "skipped"),  # combined by hand
        ((Accumulation(2, 1, 0, 1.0),) * 4, "warn"),
        ((Accumulation(2, 1, 0, 1.0),) * 3, "pending"),
    ],
)
def test_cleared_gradient(steps: tuple[Accumulation, ...], status: str) -> None:
    assert CHECK.code == "LP309"
    assert judge(facts(accumulated=steps)).status == status


def test_it_says_how_many() -> None:
    verdict = judge(facts(accumulated=(CLEARED, CLEARED)))
    assert verdict.evidence == {"got": "3 of 4 passes cleared, in 2 steps in a row", "expected": "the sum of 4 passes"}
    assert verdict.slots == ALL
