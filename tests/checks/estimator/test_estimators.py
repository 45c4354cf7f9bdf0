"""What all checks of an estimator share."""

from __future__ import annotations

from support.facts import bad, estimator, expect, facts

from lora_probe_callbacks.checks._base import fail, ok, pending, skipped, warn
from lora_probe_callbacks.checks.estimator._estimators import also_at_estimators, each


def test_worst_verdict_is_the_one_that_is_given() -> None:
    kinds = {
        "a": fail("broken", got="1", expected="0"),
        "b": warn("odd", got="1", expected="0", fix="look"),
        "c": ok(),
        "d": pending("soon"),
        "e": skipped("never"),
    }
    for names, status in (("edcba", "fail"), ("edcb", "warn"), ("edc", "pass"), ("ed", "pending"), ("e", "skipped")):
        what = facts(estimators=tuple(estimator(name=n, step=i, framework_step=9) for i, n in enumerate(names)))
        verdict = each(what, lambda _, one: kinds[one.name])
        assert (verdict.status, verdict.seen) == (status, (len(names) - 1, 9))


def test_without_an_estimator_it_is_pending() -> None:
    expect(each(facts(), lambda *_: ok()), "pending", "no estimator was looked at yet")
    assert each(facts(), lambda *_: ok()).nothing_new is True  # a reason that was given before says more


def test_nothing_to_say_is_skipped_with_the_reason() -> None:
    what = facts(estimators=(estimator(),))
    expect(each(what, lambda *_: None), "skipped", "nothing of this kind was given", seen=(4, 40))
    what = facts(estimators=(estimator(why_not="it raised"),))
    expect(each(what, lambda *_: None), "skipped", "it raised", seen=(4, 40))


def test_training_forward_comes_first() -> None:
    judge = also_at_estimators(lambda what: fail(what.active[0], got="1", expected="0", cause="c"))
    verdict = judge(facts(estimators=(estimator(active=("other",)),)))
    assert (verdict.message, verdict.cause, verdict.seen) == ("default", "c", None)


def test_facts_of_an_estimator_stand_in_for_those_of_the_training() -> None:
    seen = []

    def judge(what: object) -> object:
        seen.append(what)
        return ok() if len(seen) == 1 else warn("odd", got="1", expected="0", fix="look", cause="c")

    own = estimator(modes=("merged", "active"), active=("other",), forwards=facts(forward={"received": False}).forwards)
    silent = estimator(name="without a forward", forwards=())
    verdict = also_at_estimators(judge)(facts(estimators=(silent, own), unobservable="compiled"))
    assert len(seen) == 2
    assert (seen[1].modes, seen[1].active, seen[1].unobservable) == (own.modes, ("other",), None)
    assert not seen[1].gradients.read.any()
    assert [f.received for f in seen[1].forwards] == [True]
    assert (verdict.status, verdict.cause, verdict.seen) == ("warn", "S c", (4, 40))
    assert verdict.message == "at the forward of estimator 'S': odd"


def test_healthy_estimator_changes_nothing() -> None:
    assert not bad(facts(estimators=(estimator(),)))
    judged = also_at_estimators(lambda what: ok() if what.gradients else pending("none"))
    assert judged(facts(estimators=(estimator(),))).status == "pass"
