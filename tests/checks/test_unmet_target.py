from __future__ import annotations

from typing import Any

import pytest
from facts import facts

from lora_probe_callbacks.checks.unmet_target import judge
from lora_probe_callbacks.observe.facts import (
    Coverage,
    Facts,
    Request,
)


def covered(**changes: Any) -> Facts:
    return facts(coverage=Coverage(**changes))


TYPO = Request("default", "target_modules", "q_porj", exists=False)


@pytest.mark.parametrize(
    ("coverage", "status", "cause"),
    [
        (Coverage(), "pass", ""),
        (Coverage(expected=(("vision", 2), ("language", 0))), "fail", "expected"),
        (Coverage(expected=(("vision", 2),)), "pass", ""),
        (Coverage(unmet=(TYPO,)), "warn", "target_modules"),
        (Coverage(unmet=(TYPO,), expected=(("q_proj", 2),)), "pass", ""),  # what counts is covered
        (Coverage(unmet=(TYPO,), expected=(("q_proj", 0),)), "fail", "expected"),
        (Coverage(sparse=(("layers", 4, 56),)), "warn", "sparse"),
        (Coverage(sparse=(("layers", 4, 56),), expected=(("q_proj", 4),)), "pass", ""),
    ],
)
def test_targets(coverage: Coverage, status: str, cause: str) -> None:
    verdict = judge(facts(coverage=coverage))
    assert (verdict.status, verdict.cause) == (status, cause)


def test_before_the_first_forward_nothing_is_judged() -> None:
    assert judge(facts()).status == "pending"
    assert judge(covered()).status == "pass"
