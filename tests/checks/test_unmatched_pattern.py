from __future__ import annotations

from typing import Any

from facts import bad, facts

from lora_probe_callbacks.checks.unmatched_pattern import judge
from lora_probe_callbacks.observe.facts import (
    Coverage,
    Facts,
)


def covered(**changes: Any) -> Facts:
    return facts(coverage=Coverage(**changes))


def test_before_the_first_forward_nothing_is_judged() -> None:
    assert judge(facts()).status == "pending"
    assert judge(covered()).status == "pass"


def test_key_that_matches_nothing_warns_by_itself() -> None:
    verdicts = bad(covered(patterns=(("rank_pattern", "q_porj"), ("alpha_pattern", "v_porj"))))
    assert list(verdicts) == ["LP602"]
    assert verdicts["LP602"].status == "warn"
    assert "rank_pattern has 'q_porj'" in verdicts["LP602"].message
