from __future__ import annotations

import pytest
from support.facts import ALL, bad, estimator, expect, facts

from lora_probe_callbacks.checks.reachability.estimator_gradient import CHECK

SEEN = (4, 40)


def test_loss_that_gives_no_gradient_fails() -> None:
    what = facts(estimators=(estimator(missing=ALL),))
    assert list(bad(what)) == ["LP305"]
    expect(
        CHECK.judge(what),
        "fail",
        "the loss of estimator 'S' gives the adapter no gradient: all 4 are None",
        slots=ALL,
        cause="S",
        got="4 of 4 gradients None",
        expected="0",
        seen=SEEN,
    )


def test_only_what_the_direction_wants_counts() -> None:
    part = estimator(missing=frozenset([0, 1]), direction=frozenset([0, 1]))
    assert CHECK.judge(facts(estimators=(part,))).slots == {0, 1}
    some = estimator(missing=frozenset([0, 1, 2]))
    expect(CHECK.judge(facts(estimators=(some,))), "pass", seen=SEEN)
    every = estimator(missing=ALL, direction=None)
    assert CHECK.judge(facts(estimators=(every,))).slots == ALL
    foreign = estimator(missing=ALL, direction=frozenset())
    expect(CHECK.judge(facts(estimators=(foreign,))), "pass", seen=SEEN)


@pytest.mark.parametrize("zero", [1, 3, 4])
def test_gradients_of_zero_fail_after_four_looks(zero: int) -> None:
    verdict = CHECK.judge(facts(estimators=(estimator(zero=zero, direction=frozenset([0, 1])),)))
    if zero < 4:
        words = f"its gradients were exactly zero in {zero} look(s): groups of equal responses are healthy"
        expect(verdict, "pending", words, seen=SEEN)
        return
    expect(
        verdict,
        "fail",
        "the loss of estimator 'S' gives the adapter gradients of exactly zero, 4 times in a row",
        slots=[0, 1],
        cause="S",
        got="every gradient exactly 0",
        expected="a gradient",
        seen=SEEN,
    )


def test_without_a_gradient_it_is_skipped() -> None:
    expect(CHECK.judge(facts(estimators=(estimator(missing=None),))), "skipped", "nothing of this kind", seen=SEEN)


def test_gradients_that_arrive_pass() -> None:
    expect(CHECK.judge(facts(estimators=(estimator(),))), "pass", seen=SEEN)


def test_unreachable_adapter_is_the_nearer_cause() -> None:
    assert list(bad(facts(estimators=(estimator(missing=ALL, reached=frozenset()),)))) == ["LP304"]
