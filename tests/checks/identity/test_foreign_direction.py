from __future__ import annotations

from support.facts import ALL, GRADIENT, NONE, bad, estimator, expect, facts, unread

from lora_probe_callbacks.checks.identity.foreign_direction import CHECK

SEEN = (4, 40)


def test_direction_of_other_tensors_fails() -> None:
    what = facts(estimators=(estimator(direction=frozenset([0]), direction_foreign=("x", "y")),))
    assert list(bad(what)) == ["LP204"]
    expect(
        CHECK.judge(what),
        "fail",
        "the update direction of estimator 'S' was built on other tensors than those that train: x, y",
        slots=ALL,
        cause="S",
        got="1 of 4 adapter tensors, and 2 that the model does not hold",
        expected="tensors of the model that is trained, by object",
        seen=SEEN,
    )


def test_direction_without_a_tensor_of_the_adapter_fails() -> None:
    verdict = CHECK.judge(facts(estimators=(estimator(direction=frozenset()),)))
    assert (verdict.status, "tensors that are no part of the adapter" in verdict.message) == ("fail", True)
    frozen = facts(at={0: {"frozen_by_intent": True}}, estimators=(estimator(direction=frozenset([0])),))
    assert CHECK.judge(frozen).status == "fail"


def test_direction_that_leaves_out_what_the_step_moves_warns() -> None:
    gradients = [GRADIENT, GRADIENT, GRADIENT, NONE]
    what = facts(gradients=gradients, estimators=(estimator(direction=frozenset([0])),))
    expect(
        CHECK.judge(what),
        "warn",
        "leaves out 2 adapter tensors that the step moves: layer.0.lora_B, layer.1.lora_A",
        slots=[1, 2],
        cause="S",
        got="1 of 3 tensors with a gradient",
        expected="all of them, or a part on purpose",
        fix='pass ignore=("LP204",)',
        seen=SEEN,
    )


def test_direction_of_all_that_learns_passes() -> None:
    gradients = [GRADIENT, GRADIENT, NONE, NONE]
    expect(
        CHECK.judge(facts(gradients=gradients, estimators=(estimator(direction=frozenset([0, 1])),))), "pass", seen=SEEN
    )
    expect(CHECK.judge(facts(estimators=(estimator(),))), "pass", seen=SEEN)


def test_gradients_that_were_not_read_leave_nothing_out() -> None:
    expect(CHECK.judge(unread(facts(estimators=(estimator(direction=frozenset([0])),)))), "pass", seen=SEEN)


def test_without_a_direction_it_is_skipped() -> None:
    what = facts(estimators=(estimator(direction=None),))
    expect(CHECK.judge(what), "skipped", "nothing of this kind was given", seen=SEEN)


def test_other_module_is_the_nearer_cause() -> None:
    away = estimator(direction=frozenset(), direction_foreign=("x",), reached=frozenset(), foreign=4, forwards=())
    assert list(bad(facts(estimators=(away,)))) == ["LP205"]
