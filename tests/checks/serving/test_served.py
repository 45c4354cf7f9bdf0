"""The checks on what should hold the adapter: each reports its own verdict and leaves the others to its neighbours."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.facts import facts

from lora_probe_callbacks.checks._base import Verdict
from lora_probe_callbacks.checks._catalogue import all_checks
from lora_probe_callbacks.facts import RolloutFact, ServedFact

CHECKS = {check.code: check for check in all_checks() if check.family == "serving"}


def verdicts(**known: Any) -> dict[str, Verdict]:
    there = dataclasses.replace(facts(), **known)
    return {code: check.judge(there) for code, check in CHECKS.items()}


def bad(**known: Any) -> list[tuple[str, str]]:
    return [(code, v.status) for code, v in verdicts(**known).items() if v.status in ("warn", "fail")]


def served(verdict: Any, **more: Any) -> tuple[ServedFact]:
    return (ServedFact("ad at http://x", verdict, effect=0.1, tokens=100, layers=14, **more),)


def rollout(verdict: Any, **more: Any) -> tuple[RolloutFact]:
    return (RolloutFact(3, 5, verdict, frozenset([0, 1]), tokens=200, apart=0.1, **more),)


def test_codes_are_a_family_of_their_own() -> None:
    assert list(CHECKS) == [f"LP81{n}" for n in range(1, 10)]


@pytest.mark.parametrize(
    ("verdict", "code", "more", "words"),
    [
        ("ignored", "LP811", {}, "behaves as the base"),
        ("partly", "LP812", {"off": ("a.q", "b.q"), "where": "every q"}, "2 of 14 layers: every q"),
        ("other-adapter", "LP813", {"other": "french"}, "is the adapter 'french' of this model"),
        ("other-adapter", "LP813", {}, "nor a checkpoint at hand"),
        ("lossy", "LP814", {"scale": 0.5}, "the whole adapter at 0.5 times its scale"),
        (
            "lossy",
            "LP814",
            {"lost": 0.4, "best": 0.38, "dtype": "nf4"},
            "by 40% of what the adapter does; rounding to nf4 costs 38%",
        ),
        ("stale", "LP815", {"checkpoint": "run/checkpoint-1"}, "an earlier state of the adapter: run/checkpoint-1"),
    ],
)
def test_verdict_of_a_target(verdict: str, code: str, more: dict[str, Any], words: str) -> None:
    assert bad(served=served(verdict, **more)) == [(code, "fail")]
    assert words in verdicts(served=served(verdict, **more))[code].message


def test_served_target_is_quiet() -> None:
    assert not bad(served=served("served"))
    assert verdicts(served=served("served"))["LP811"].status == "pass"


@pytest.mark.parametrize(
    ("needed", "words"), [(5000, "it takes 5000 like these at least"), (None, "no number of them")]
)
def test_undecidable_target_says_what_would_settle_it(needed: int | None, words: str) -> None:
    assert not bad(served=served("undecidable", needed=needed))
    assert words in verdicts(served=served("undecidable", needed=needed))["LP811"].message


def test_worse_of_two_targets() -> None:
    assert bad(served=(*served("served"), *served("stale"))) == [("LP815", "fail")]


def test_loss_beyond_what_the_type_costs_has_another_fix() -> None:
    more = {"lost": 0.9, "best": 0.1, "dtype": "bfloat16", "merged": True}
    assert "round once" in verdicts(served=served("lossy", **more))["LP814"].fix
    assert "cannot hold" in verdicts(served=served("lossy", **{**more, "best": 0.8}))["LP814"].fix


def test_limits_warn() -> None:
    assert bad(limits=("DoRA: vLLM refuses it",)) == [("LP816", "warn")]
    assert not bad(limits=())


@pytest.mark.parametrize(
    ("verdict", "more", "expected"),
    [
        ("same", {}, []),
        ("undecidable", {}, []),
        ("ignored", {}, [("LP817", "fail")]),
        ("late", {"late": 1}, [("LP817", "warn")]),
        ("late", {"late": 2}, [("LP817", "fail")]),
        ("other", {}, [("LP817", "warn")]),
        ("sampling", {"temperature": 0.7}, [("LP818", "warn")]),
        ("tokens", {}, [("LP819", "fail")]),
        ("undecidable", {"why": "too few"}, []),
    ],
)
def test_verdict_of_a_rollout(verdict: str, more: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert bad(rollouts=rollout(verdict, **more)) == expected


def test_finding_of_a_rollout_has_its_own_step() -> None:
    assert verdicts(rollouts=rollout("ignored"))["LP817"].seen == (3, 5)


def test_rollout_that_was_not_compared_is_not_judged() -> None:
    verdict = verdicts(rollouts=rollout("undecidable", why="too few"))["LP817"]
    assert (verdict.status, verdict.message) == ("skipped", "too few")
