from __future__ import annotations

from support.facts import ALL, bad, estimator, expect, facts

from lora_probe_callbacks.checks.reachability.estimator_unreachable import CHECK

SEEN = (4, 40)


def test_graph_that_leads_elsewhere_fails() -> None:
    what = facts(estimators=(estimator(reached=frozenset()),))
    assert list(bad(what)) == ["LP304"]
    expect(
        CHECK.judge(what),
        "fail",
        "estimator 'S' does not depend on the adapter",
        "has a graph that leads to none of the adapter's tensors",
        slots=ALL,
        cause="S",
        got="0 of 4 adapter tensors in its graph",
        expected="all of them",
        seen=SEEN,
    )


def test_no_graph_fails() -> None:
    for reached in (frozenset(), None):
        verdict = CHECK.judge(facts(estimators=(estimator(graph=False, reached=reached),)))
        assert (verdict.status, verdict.message.endswith("what it differentiates carries no graph")) == ("fail", True)


def test_tensors_frozen_by_intent_do_not_count() -> None:
    what = facts(at={0: {"frozen_by_intent": True}}, estimators=(estimator(reached=frozenset([0])),))
    assert CHECK.judge(what).slots == {1, 2, 3}


def test_layers_that_ran_and_are_not_in_the_graph_warn() -> None:
    what = facts(estimators=(estimator(reached=frozenset([0, 1])),))
    expect(
        CHECK.judge(what),
        "warn",
        "does not depend on 2 adapter tensors whose layers ran in its forward: layer.1.lora_A, layer.1.lora_B",
        slots=[2, 3],
        cause="S",
        got="2 of 4 adapter tensors in its graph",
        expected="those of all layers that ran",
        fix="if a part is detached on purpose nothing is wrong",
        seen=SEEN,
    )


def test_only_what_the_direction_wants_counts() -> None:
    part = estimator(reached=frozenset([0, 1]), direction=frozenset([0, 1]))
    expect(CHECK.judge(facts(estimators=(part,))), "pass", seen=SEEN)
    none = estimator(reached=frozenset([0, 1]), direction=None)
    assert CHECK.judge(facts(estimators=(none,))).slots == {2, 3}
    wider = estimator(reached=frozenset([0]), direction=frozenset([0, 1]))
    verdict = CHECK.judge(facts(estimators=(wider,)))
    assert (verdict.slots, verdict.evidence["got"]) == ({1}, "1 of 2 adapter tensors in its graph")


def test_layers_that_did_not_run_or_are_frozen_are_not_missed() -> None:
    ran = facts(forward={"with_grad": frozenset([0])}).forwards
    expect(CHECK.judge(facts(estimators=(estimator(reached=frozenset([0, 1]), forwards=ran),))), "pass", seen=SEEN)
    unseen = facts(forward={"with_grad": None}).forwards
    expect(CHECK.judge(facts(estimators=(estimator(reached=frozenset([0, 1]), forwards=unseen),))), "pass", seen=SEEN)
    frozen = {2: {"requires_grad": False}, 3: {"requires_grad": False}}
    expect(CHECK.judge(facts(at=frozen, estimators=(estimator(reached=frozenset([0, 1])),))), "pass", seen=SEEN)


def test_blind_graph_is_pending() -> None:
    blind = estimator(reached=None, why_unknown="a checkpoint hides it")
    words = "a checkpoint hides it; the gradients decide"
    expect(CHECK.judge(facts(estimators=(blind,))), "pending", words, seen=SEEN)


def test_without_a_value_it_is_skipped() -> None:
    expect(CHECK.judge(facts(estimators=(estimator(graph=None),))), "skipped", "nothing of this kind", seen=SEEN)


def test_estimator_that_reaches_all_passes() -> None:
    expect(CHECK.judge(facts(estimators=(estimator(),))), "pass", seen=SEEN)


def test_missing_gradients_are_left_to_the_neighbour() -> None:
    assert list(bad(facts(estimators=(estimator(missing=ALL),)))) == ["LP305"]
