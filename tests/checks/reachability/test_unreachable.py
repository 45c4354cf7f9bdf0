from __future__ import annotations

import dataclasses

import pytest
from support.facts import ALL, GRADIENT, NONE, bad, expect, facts, unread

from lora_probe_callbacks.checks.reachability.unreachable import CHECK

NEVER = {"missing": 1, "had_gradient": False, "had_signal": False}
NOWHERE = {"reached": frozenset()}
GRAPH = "the graph of its forward does not lead there"


def test_graph_that_leads_to_nothing_fails_at_once() -> None:
    what = facts(gradients=[NONE] * 4, history=NEVER)
    assert list(bad(what)) == ["LP301"]
    words = f"the loss does not depend on any of the 4 adapter tensors: {GRAPH}"
    expect(
        CHECK.judge(what), "fail", words, slots=ALL, got="0 of 4 adapter tensors in the graph", expected="all of them"
    )


def test_output_that_gets_no_gradient_fails() -> None:
    what = facts(gradients=[NONE] * 4, history=NEVER, forward={"received": False, "reached": ALL})
    expect(
        CHECK.judge(what),
        "fail",
        "the loss does not depend on any of the 4 adapter tensors: no gradient arrived at the output of the forward",
        slots=ALL,
        got="0 gradients at the output of model",
        expected="the loss made from that output",
    )


@pytest.mark.parametrize(("missing", "had", "status"), [(3, False, "pending"), (4, False, "fail"), (4, True, "warn")])
def test_part_is_judged_over_time(missing: int, had: bool, status: str) -> None:
    lost = {"missing": missing, "had_gradient": had}
    verdict = CHECK.judge(facts(gradients=[GRADIENT, GRADIENT, NONE, NONE], at={2: lost, 3: lost}))
    text = f"the loss does not depend on 2 adapter tensors (layer.1.lora_A, layer.1.lora_B): {GRAPH}"
    evidence = {"slots": [2, 3], "got": "2 of 4 adapter tensors in the graph", "expected": "all of them"}
    if status == "pending":
        expect(verdict, "pending", f"{text}; judged after 4 probed steps, 3 so far")
    elif status == "fail":
        expect(verdict, "fail", f"{text}, in 4 probed steps in a row", **evidence)
    else:
        expect(verdict, "warn", text, fix="if these steps serve another objective nothing is wrong", **evidence)


def test_whole_adapter_after_gradients_were_seen_warns_then_fails() -> None:
    for missing, status in ((1, "warn"), (3, "warn"), (4, "fail")):
        what = facts(gradients=[NONE] * 4, history={"missing": missing})
        assert CHECK.judge(what).status == status, missing


def test_exception_is_judged_by_the_graph_alone() -> None:
    what = unread(facts(reads=(0,) * 4, forward=NOWHERE, moment="exception"))
    assert (CHECK.judge(what).status, CHECK.judge(what).slots) == ("fail", ALL)
    expect(CHECK.judge(dataclasses.replace(what, moment="step")), "pass")
    none_received = facts(reads=(0,) * 4, forward={**NOWHERE, "received": False})
    verdict = CHECK.judge(unread(dataclasses.replace(none_received, moment="exception")))
    assert "graph of its forward" in verdict.message


def test_gradients_that_arrive_outweigh_the_graph() -> None:
    expect(CHECK.judge(facts(forward=NOWHERE)), "pass")


def test_blind_graph_is_skipped_with_its_reason() -> None:
    blind = {"reached": None, "why_unknown": "a reentrant checkpoint hides it"}
    expect(CHECK.judge(facts(gradients=[NONE] * 4, forward=blind)), "skipped", "a reentrant checkpoint hides it")
    expect(CHECK.judge(facts(forward={"reached": None})), "skipped", "the graph was not walked in this step")
    both = facts(gradients=[NONE] * 4)
    one_blind = dataclasses.replace(both, forwards=both.forwards + facts(forward=blind).forwards)
    expect(CHECK.judge(one_blind), "skipped", "a reentrant checkpoint hides it")
    one_unseen = dataclasses.replace(both, forwards=both.forwards + facts(forward={"reached": None}).forwards)
    assert CHECK.judge(one_unseen).status == "warn"


def test_no_forward_is_pending_with_its_reason() -> None:
    expect(CHECK.judge(facts(forwards=())), "pending", "no training forward was seen")
    expect(CHECK.judge(facts(forwards=(), unobservable="it is compiled")), "pending", "it is compiled")


def test_second_forward_that_leads_there_is_enough() -> None:
    lost = facts(gradients=[NONE] * 4, history=NEVER)
    expect(CHECK.judge(dataclasses.replace(lost, forwards=lost.forwards + facts().forwards)), "pass")


def test_what_is_left_to_the_neighbours() -> None:
    left = {"gradients": [NONE] * 4, "history": NEVER}
    expect(CHECK.judge(facts(**left, slot={"requires_grad": False})), "pass")  # LP203
    expect(CHECK.judge(facts(**left, called=[False, False])), "pass")  # LP104
    expect(CHECK.judge(facts(**left, forward={"with_grad": frozenset()})), "pass")  # LP302
    expect(CHECK.judge(facts(**left, slot={"frozen_by_intent": True})), "pass")


def test_calls_that_cannot_be_seen_do_not_matter() -> None:
    assert CHECK.judge(facts(gradients=[NONE] * 4, history=NEVER, forward={"calls": None})).status == "fail"


def test_healthy_graph_passes() -> None:
    expect(CHECK.judge(facts()), "pass")


def test_part_that_learned_before_is_pending_at_first() -> None:
    assert (
        CHECK.judge(facts(gradients=[GRADIENT, GRADIENT, NONE, NONE], at={2: {"missing": 3}, 3: {"missing": 3}})).status
        == "pending"
    )


def test_exception_tells_what_was_got_and_expected() -> None:
    what = unread(facts(reads=(0,) * 4, forward=NOWHERE, moment="exception"))
    expect(
        CHECK.judge(what), "fail", GRAPH, slots=ALL, got="0 of 4 adapter tensors in the graph", expected="all of them"
    )


def test_whole_is_asked_of_what_was_read() -> None:
    """After gradients were seen on one tensor the others warn, whatever is unread."""
    what = facts(gradients=[NONE] * 4, history={"missing": 1, "had_gradient": False}, at={0: {"had_gradient": True}})
    assert CHECK.judge(what).status == "warn"
