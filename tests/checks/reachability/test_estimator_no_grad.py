from __future__ import annotations

import pytest
from support.facts import ALL, bad, estimator, expect, facts

from lora_probe_callbacks.checks.reachability.estimator_no_grad import CHECK

SEEN = (4, 40)
NO_GRAPH = {"graph": False, "reached": frozenset(), "forwards": ()}


def test_forward_under_no_grad_fails() -> None:
    what = facts(estimators=(estimator(**NO_GRAPH, without_grad=2),))
    assert list(bad(what)) == ["LP306"]
    expect(
        CHECK.judge(what),
        "fail",
        "the forward of estimator 'S' ran under no_grad: what it differentiates carries no graph",
        slots=ALL,
        cause="S",
        got="2 call(s) of the model without gradients",
        expected="a forward with gradients enabled",
        seen=SEEN,
    )


def test_inference_mode_has_its_own_advice() -> None:
    verdict = CHECK.judge(facts(estimators=(estimator(**NO_GRAPH, inference=True),)))
    expect(
        verdict,
        "fail",
        "ran under inference_mode",
        slots=ALL,
        cause="S",
        got="0 call(s) of the model without gradients",
        expected="a forward with gradients enabled",
        fix="inference_mode cannot be undone inside",
        seen=SEEN,
    )


@pytest.mark.parametrize("changes", [{"graph": True}, {"forwards": facts().forwards}, {"without_grad": 0}])
def test_what_is_no_forward_without_gradients_passes(changes: dict[str, object]) -> None:
    healthy = estimator(**{**NO_GRAPH, "without_grad": 1, **changes})
    expect(CHECK.judge(facts(estimators=(healthy,))), "pass", seen=SEEN)


def test_forward_whose_layers_ran_without_gradients_fails() -> None:
    inside = facts(forward={"with_grad": frozenset()}).forwards
    assert (
        CHECK.judge(facts(estimators=(estimator(**{**NO_GRAPH, "forwards": inside}, without_grad=1),))).status == "fail"
    )


def test_without_a_value_it_is_skipped() -> None:
    expect(CHECK.judge(facts(estimators=(estimator(graph=None),))), "skipped", "nothing of this kind", seen=SEEN)


def test_detached_value_is_left_to_unreachable() -> None:
    what = facts(estimators=(estimator(graph=False, reached=frozenset()),))
    assert list(bad(what)) == ["LP304"]
