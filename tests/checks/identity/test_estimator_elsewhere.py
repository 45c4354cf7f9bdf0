from __future__ import annotations

import dataclasses

import pytest
from support.facts import ALL, bad, estimator, expect, facts

from lora_probe_callbacks.checks.identity.estimator_elsewhere import CHECK

SEEN = (4, 40)
OURS = "the 4 adapter tensors of the model that is trained"
NOWHERE = {"reached": frozenset(), "forwards": ()}


def test_estimator_on_another_module_fails() -> None:
    what = facts(estimators=(estimator(**NOWHERE, foreign=6),))
    assert list(bad(what)) == ["LP205"]
    expect(
        CHECK.judge(what),
        "fail",
        "estimator 'S' runs on another module: it leads to 6 parameters that the trained model does not hold",
        slots=ALL,
        cause="S",
        got="6 parameters of another module",
        expected=OURS,
        seen=SEEN,
    )


@pytest.mark.parametrize(("graph", "words"), [(True, "leads to no parameter"), (False, "carries no graph")])
def test_no_forward_of_the_trained_model_made_it(graph: bool, words: str) -> None:
    what = facts(estimators=(estimator(**NOWHERE, graph=graph, elsewhere=("a copy",)),))
    expect(
        CHECK.judge(what),
        "fail",
        f"estimator 'S' {words}, and no forward of the trained model made it",
        slots=ALL,
        cause="S",
        got="a copy",
        expected=OURS,
        seen=SEEN,
    )


def test_detached_forward_of_the_trained_model_is_left_to_unreachable() -> None:
    spare = facts(forward={"received": False}).forwards
    what = facts(estimators=(estimator(**NOWHERE, graph=False, elsewhere=("a copy",)),))
    what = dataclasses.replace(what, forwards=what.forwards + spare)
    expect(CHECK.judge(what), "pass", seen=SEEN)
    for no_spare in ({"holds_expected": False}, {"carries_graph": False}):
        aside = tuple(dataclasses.replace(f, **no_spare) for f in spare)
        other = dataclasses.replace(what, forwards=what.forwards[:1] + aside)
        assert CHECK.judge(other).status == "fail", no_spare
    with_graph = dataclasses.replace(what, estimators=(estimator(**NOWHERE, elsewhere=("a copy",)),))
    assert CHECK.judge(with_graph).status == "fail"


def test_foreign_parameters_beside_a_forward_of_ours_pass() -> None:
    """A critic's head in the estimator's graph."""
    expect(CHECK.judge(facts(estimators=(estimator(reached=frozenset(), foreign=6),))), "pass", seen=SEEN)
    foreign = facts(forward={"holds_expected": False}).forwards
    assert (
        CHECK.judge(facts(estimators=(estimator(reached=frozenset(), foreign=6, forwards=foreign),))).status == "fail"
    )


def test_estimator_that_reaches_the_adapter_passes() -> None:
    expect(CHECK.judge(facts(estimators=(estimator(foreign=6, forwards=(), elsewhere=("a",)),))), "pass", seen=SEEN)
    frozen = facts(
        at={0: {"frozen_by_intent": True}}, estimators=(estimator(**{**NOWHERE, "reached": frozenset([0])}, foreign=6),)
    )
    assert CHECK.judge(frozen).status == "fail"


def test_reasons_not_to_judge() -> None:
    for blind in ({"graph": None, "reached": None}, {"reached": None, "why_unknown": "a checkpoint"}):
        expect(CHECK.judge(facts(estimators=(estimator(**blind),))), "skipped", "nothing of this kind", seen=SEEN)


def test_merged_adapter_is_left_to_its_own_check() -> None:
    merged = facts(modes=["merged"] * 2)
    expect(
        CHECK.judge(facts(estimators=(estimator(forwards=merged.forwards, reached=frozenset()),))), "pass", seen=SEEN
    )
