from __future__ import annotations

from typing import Any

import pytest
from facts import facts

from lora_probe_callbacks.checks.wrong_start import judge
from lora_probe_callbacks.observe.facts import (
    Facts,
    ReferenceFact,
    StartFact,
    UnitStart,
)

FRESH = UnitStart(a=0.1, b=0.0, product=0.0, moves_base=False)


TRAINED = UnitStart(a=0.1, b=0.1, product=0.3, moves_base=False)


ORTHOGONAL = UnitStart(a=0.1, b=0.1, product=1e-4, moves_base=False)


PISSA = UnitStart(a=0.1, b=0.1, product=0.3, moves_base=True)


def started(*units: UnitStart | None, step: int = 0, state: bool = False, **changes: Any) -> Facts:
    return facts(start=StartFact(tuple(units), step, state), **changes)


AGAINST = ReferenceFact(disabled=True, active=0)


@pytest.mark.parametrize(
    ("what", "status", "cause"),
    [
        (started(FRESH, FRESH, resumed=False), "pass", ""),
        (started(ORTHOGONAL, FRESH, resumed=False), "pass", ""),
        (started(TRAINED, FRESH, resumed=False), "fail", "fresh"),
        (started(TRAINED, TRAINED, resumed=True), "pass", ""),
        (started(FRESH, FRESH, resumed=True), "fail", "resumed"),
        (started(FRESH, TRAINED, resumed=True), "warn", "resumed in part"),
        (started(FRESH, FRESH), "pass", ""),
        (started(FRESH, FRESH, step=7), "warn", "step without adapter"),
        (started(FRESH, FRESH, state=True), "warn", "step without adapter"),
        (started(FRESH, FRESH, step=7, resumed=False), "pass", ""),
        (started(TRAINED, TRAINED, step=7), "pass", ""),
        (started(TRAINED, TRAINED, reference=AGAINST), "warn", "reference"),
        (started(TRAINED, TRAINED, reference=AGAINST, resumed=True), "warn", "reference"),
        (started(TRAINED, TRAINED, reference=AGAINST, step=7), "pass", ""),
        (started(TRAINED, TRAINED, reference=AGAINST, state=True), "pass", ""),
        (started(FRESH, FRESH, reference=AGAINST), "pass", ""),
        (started(PISSA, PISSA, reference=AGAINST), "fail", "residual"),
        (started(PISSA, PISSA, resumed=False), "skipped", ""),
        (started(PISSA, TRAINED, resumed=False), "fail", "fresh"),
        (started(None, None, resumed=True), "skipped", ""),
        (started(FRESH, FRESH, resumed=True, rewrapped=("model",)), "skipped", ""),
        (facts(resumed=True), "pending", ""),
    ],
)
def test_start(what: Facts, status: str, cause: str) -> None:
    verdict = judge(what)
    assert (verdict.status, verdict.cause) == (status, cause)
