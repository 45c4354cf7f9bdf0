from __future__ import annotations

from typing import Any

from facts import bad, facts

from lora_probe_callbacks.checks.frozen_head import judge
from lora_probe_callbacks.observe.facts import (
    Coverage,
    Facts,
)


def covered(**changes: Any) -> Facts:
    return facts(coverage=Coverage(**changes))


def test_before_the_first_forward_nothing_is_judged() -> None:
    assert judge(facts()).status == "pending"
    assert judge(covered()).status == "pass"


def test_fresh_head_that_is_frozen_warns_by_itself() -> None:
    verdicts = bad(covered(fresh_heads=("score",)))
    assert list(verdicts) == ["LP603"]
    assert verdicts["LP603"].status == "warn"
    assert "modules_to_save=['score']" in verdicts["LP603"].fix
