from __future__ import annotations

import pytest
from support.facts import bad, expect, facts

from lora_probe_callbacks.checks.coverage.unmet_target import CHECK, judge
from lora_probe_callbacks.facts import (
    Coverage,
    Request,
)

TYPO = Request("default", "target_modules", "q_porj", exists=False)
PASSED_OVER = Request("default", "target_modules", "k_proj", exists=True)
HEAD = Request("default", "modules_to_save", "lm_haed", exists=False)
STACK = ("layers", 4, 56)


@pytest.mark.parametrize(
    ("coverage", "status", "cause"),
    [
        (Coverage(), "pass", ""),
        (Coverage(expected=(("vision", 2), ("language", 0))), "fail", "expected"),
        (Coverage(expected=(("vision", 2),)), "pass", ""),
        (Coverage(unmet=(TYPO,)), "warn", "target_modules"),
        (Coverage(unmet=(TYPO,), expected=(("q_proj", 2),)), "pass", ""),  # what counts is covered
        (Coverage(unmet=(TYPO,), expected=(("q_proj", 0),)), "fail", "expected"),
        (Coverage(sparse=(STACK,)), "warn", "sparse"),
        (Coverage(sparse=(STACK,), expected=(("q_proj", 4),)), "pass", ""),
        (Coverage(sparse=(STACK,), unmet=(TYPO,)), "warn", "target_modules"),
    ],
)
def test_targets(coverage: Coverage, status: str, cause: str) -> None:
    verdict = judge(facts(coverage=coverage))
    assert (verdict.status, verdict.cause) == (status, cause)


def test_declared_name_that_owns_nothing_fails() -> None:
    what = facts(coverage=Coverage(expected=(("vision", 1), ("audio", 0), ("lm_head", 0))))
    expect(
        judge(what),
        "fail",
        "no adapted module has 'audio', 'lm_head' in its name",
        cause="expected",
        got="0 of 2 adapted modules match ['audio', 'lm_head']",
        expected="an adapted module for each of ['vision', 'audio', 'lm_head']",
        fix="compare target_modules with the names in model.named_modules()",
    )
    assert list(bad(what)) == ["LP601"]


@pytest.mark.parametrize(
    ("first", "there"),
    [
        (TYPO, "the model has no such module"),
        (PASSED_OVER, "modules of that name exist and carry no adapter"),
    ],
)
def test_configured_name_that_owns_nothing_warns(first: Request, there: str) -> None:
    expect(
        judge(facts(coverage=Coverage(unmet=(first, HEAD, first)))),
        "warn",
        f"target_modules asks for {first.name!r}, {first.name!r}, and nothing of that name is adapted",
        cause="target_modules",
        got=f"{there}; 2 adapted modules by the other names",
        expected="every name in target_modules matches, or is left out",
        fix=f"if the list is meant for several architectures nothing is wrong: take {first.name!r} out",
    )


def test_stack_with_few_adapted_layers_warns() -> None:
    expect(
        judge(facts(coverage=Coverage(sparse=(STACK, ("tower", 1, 8))))),
        "warn",
        "only 4 of the 56 layers in layers carry an adapter",
        cause="sparse",
        got="4 of 56 layers",
        expected="most layers, or layers_to_transform=[...]",
        fix="if these few are meant, pass layers_to_transform",
    )


def test_before_the_first_forward_nothing_is_judged() -> None:
    expect(CHECK.judge(facts()), "pending", "no training forward has begun")
    expect(judge(facts(coverage=Coverage())), "pass")


def test_experts_are_left_to_their_own_check() -> None:
    assert list(bad(facts(coverage=Coverage(experts=("experts.down_proj",))))) == ["LP606"]
