from __future__ import annotations

from typing import Any

from facts import bad, facts

from lora_probe_callbacks.checks.untied_copy import judge
from lora_probe_callbacks.observe.facts import (
    Coverage,
    Facts,
)


def covered(**changes: Any) -> Facts:
    return facts(coverage=Coverage(**changes))


def test_before_the_first_forward_nothing_is_judged() -> None:
    assert judge(facts()).status == "pending"
    assert judge(covered()).status == "pass"


def test_copy_of_one_of_two_tied_tables_warns_by_itself() -> None:
    verdicts = bad(covered(untied=(("lm_head", "embed_tokens"),)))
    assert list(verdicts) == ["LP607"]
    assert verdicts["LP607"].status == "warn"
    assert "lm_head is trained as a copy" in verdicts["LP607"].message
