from __future__ import annotations

from typing import Any

from facts import bad, facts

from lora_probe_callbacks.checks.bare_experts import judge
from lora_probe_callbacks.observe.facts import (
    Coverage,
    Facts,
)


def covered(**changes: Any) -> Facts:
    return facts(coverage=Coverage(**changes))


def test_before_the_first_forward_nothing_is_judged() -> None:
    assert judge(facts()).status == "pending"
    assert judge(covered()).status == "pass"


def test_experts_without_an_adapter_warn_unless_a_declaration_settles_it() -> None:
    experts = ("experts.down_proj",)
    assert bad(covered(experts=experts))["LP606"].status == "warn"
    assert list(bad(covered(experts=experts, expected=(("q_proj", 1),)))) == []
    assert list(bad(covered(experts=experts, expected=(("experts", 0),)))) == ["LP601"]
