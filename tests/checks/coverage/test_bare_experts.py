from __future__ import annotations

from support.facts import bad, covered, expect, facts

from lora_probe_callbacks.checks.coverage.bare_experts import CHECK, judge

EXPERTS = ("layers.0.experts.down_proj", "layers.1.experts.down_proj")


def test_before_the_first_forward_nothing_is_judged() -> None:
    expect(CHECK.judge(facts()), "pending", "no training forward has begun")
    expect(judge(covered()), "pass")


def test_experts_without_an_adapter_warn() -> None:
    expect(
        judge(covered(experts=EXPERTS)),
        "warn",
        "2 fused expert weights carry no adapter, although their projections are in target_modules: "
        "layers.0.experts.down_proj, layers.1.experts.down_proj",
        cause="experts",
        got="0 of 2 fused expert weights adapted",
        expected="an adapter on each, or a target_modules that does not name them",
        fix="pass target_parameters=['down_proj', ...]",
    )
    assert list(bad(covered(experts=EXPERTS))) == ["LP606"]


def test_declaration_settles_it() -> None:
    assert list(bad(covered(experts=EXPERTS, expected=(("q_proj", 1),)))) == []
    assert list(bad(covered(experts=EXPERTS, expected=(("experts", 0),)))) == ["LP601"]
