from __future__ import annotations

import dataclasses

import pytest
from support.facts import ALL, WRAPPED, bad, expect, facts, ranks

from lora_probe_callbacks.checks.ranks.gradients_not_reduced import CHECK

GOT = "a sample of the gradients differs by 5.0% of its norm between rank 0 and rank 1"
EQUAL = "equal gradients on all ranks when the optimizer steps"
WORDS = "the gradients of rank 0 and rank 1 differ when the optimizer steps: "
UNWRAPPED = dataclasses.replace(WRAPPED, kind=None)


@pytest.mark.parametrize(
    ("changes", "why", "fix"),
    [
        ({}, "DistributedDataParallel did not reduce them", ""),
        (
            {"bypassed": True},
            "the loss was made on the module inside DistributedDataParallel",
            "call the DistributedDataParallel itself",
        ),
        (
            {"unsynced": True},
            "the last backward of the step ran inside no_sync() of",
            "leave no_sync() for the last micro-batch",
        ),
    ],
)
def test_gradients_that_differ_when_the_optimizer_steps_fail(changes: dict[str, bool], why: str, fix: str) -> None:
    what = facts(**ranks(gradients=False, **changes))
    assert list(bad(what)) == ["LP702"]
    expect(CHECK.judge(what), "fail", WORDS + why, slots=ALL, got=GOT, expected=EQUAL, fix=fix)


def test_without_a_wrapper_it_warns() -> None:
    what = facts(**{**ranks(gradients=False), "wrapping": UNWRAPPED})
    fix = "wrap the model in DistributedDataParallel and give the wrapper to the probe"
    expect(CHECK.judge(what), "warn", WORDS + "nothing reduces them", slots=ALL, got=GOT, expected=EQUAL, fix=fix)


def test_gradients_that_may_still_be_reduced_are_pending() -> None:
    verdict = CHECK.judge(facts(**ranks(gradients=False, final=False)))
    expect(verdict, "pending", "may still be reduced before the update")


def test_different_tensors_explain_different_gradients() -> None:
    expect(CHECK.judge(facts(**ranks(tensors=False, gradients=False))), "skipped", "explained by LP701")
    expect(CHECK.judge(facts(**ranks(gradients=False, equal_at_start=False))), "pending", "may still be reduced")


@pytest.mark.parametrize("more", [{"differed_before": True}, {"bypassed": True}, {"unsynced": True}])
def test_different_tensors_do_not_explain_a_reduction_that_was_bypassed(more: dict[str, bool]) -> None:
    assert CHECK.judge(facts(**ranks(tensors=False, gradients=False, **more))).status == "fail"


def test_tensors_beside_the_wrapper_are_the_nearer_cause() -> None:
    what = facts(**ranks(gradients=False, unmanaged=2))
    expect(CHECK.judge(what), "skipped", "explained by LP703")
    assert list(bad(what)) == ["LP703"]


def test_reasons_not_to_judge() -> None:
    expect(CHECK.judge(facts()), "skipped", "there is one process")
    expect(CHECK.judge(facts(**{**ranks(gradients=False), "wrapping": None})), "pending", "nothing is exchanged")
    expect(CHECK.judge(facts(**ranks(gradients=False, hook=True))), "skipped", "a communication hook")
    expect(CHECK.judge(facts(**ranks(gradients=False, bad=(("LP102", "fail"),)))), "skipped", "explained by LP102")
    shards = {**ranks(gradients=False), "wrapping": dataclasses.replace(WRAPPED, whole=0)}
    expect(CHECK.judge(facts(**shards)), "skipped", "every adapter tensor is in shards")
    waiting = "no gradient was read on all ranks at this decision"
    expect(CHECK.judge(facts(**ranks(gradients=False, moment="skipped"))), "pending", waiting)


def test_hook_on_one_rank_is_enough_to_skip() -> None:
    sent = ranks(gradients=False)
    reports = (dataclasses.replace(sent["ranks"].reports[0], hook=True), sent["ranks"].reports[1])
    sent["ranks"] = dataclasses.replace(sent["ranks"], reports=reports)
    assert CHECK.judge(facts(**sent)).status == "skipped"


def test_equal_gradients_pass() -> None:
    expect(CHECK.judge(facts(**ranks())), "pass")


def test_former_finding_of_its_own_explains_nothing() -> None:
    sent = ranks(gradients=False)
    sent["ranks"] = dataclasses.replace(sent["ranks"], causes=("LP702",))
    assert CHECK.judge(facts(**sent)).status == "fail"
