from __future__ import annotations

import dataclasses

import pytest
from support.facts import ALL, WRAPPED, bad, expect, facts, ranks

from lora_probe_callbacks.checks.ranks.ranks_differ import CHECK

GOT = "a sample of the tensors differs by 5.0% of its norm between rank 0 and rank 1"
UNWRAPPED = dataclasses.replace(WRAPPED, kind=None)


def test_different_tensors_fail() -> None:
    what = facts(**ranks(tensors=False))
    assert list(bad(what)) == ["LP701"]
    verdict = CHECK.judge(what)
    expect(
        verdict,
        "fail",
        "rank 0 and rank 1 hold different adapter tensors",
        slots=ALL,
        got=GOT,
        expected="equal tensors: the ranks average one gradient",
    )
    assert "from the start" not in verdict.message
    assert CHECK.judge(facts(**ranks(tensors=False, equal_at_start=False))).message.endswith(
        "and did so from the start"
    )


def test_ranks_that_train_each_for_itself_warn() -> None:
    what = facts(**{**ranks(tensors=False, gradients=False, equal_at_start=False), "wrapping": UNWRAPPED})
    expect(
        CHECK.judge(what),
        "warn",
        "hold different adapter tensors, nothing reduces their gradients, and each rank trains its own adapter",
        slots=ALL,
        got=GOT,
        expected="equal tensors, if the ranks are meant to train one adapter",
        fix="wrap the model in DistributedDataParallel",
    )


def test_without_a_wrapper_the_gradients_are_waited_for() -> None:
    sent = {**ranks(tensors=False, moment="start"), "wrapping": UNWRAPPED}
    expect(CHECK.judge(facts(**sent)), "pending", "whether their gradients are reduced is not seen at this decision")
    stepping = {**ranks(tensors=False), "wrapping": UNWRAPPED}
    assert CHECK.judge(facts(**stepping)).status == "fail"
    assert CHECK.judge(facts(**ranks(tensors=False, moment="start"))).status == "fail"


def test_missing_reduction_is_the_nearer_cause() -> None:
    what = facts(**ranks(tensors=False, gradients=False, differed_before=True))
    expect(CHECK.judge(what), "skipped", "explained by LP702")
    assert list(bad(what)) == ["LP702"]


def test_tensors_beside_the_wrapper_are_the_nearer_cause() -> None:
    what = facts(**ranks(tensors=False, unmanaged=2))
    expect(CHECK.judge(what), "skipped", "explained by LP703")
    assert list(bad(what)) == ["LP703"]


def test_what_a_rank_found_of_itself_explains_it() -> None:
    what = facts(**ranks(tensors=False, bad=(("LP103", "fail"), ("LP701", "fail"))))
    expect(CHECK.judge(what), "skipped", "explained by LP103")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"kind": "DeepSpeed"}, "DeepSpeed keeps master copies"), ({"whole": 0}, "every adapter tensor is in shards")],
)
def test_tensors_that_cannot_be_compared_are_skipped(changes: dict[str, object], reason: str) -> None:
    sent = {**ranks(tensors=False), "wrapping": dataclasses.replace(WRAPPED, **changes)}
    expect(CHECK.judge(facts(**sent)), "skipped", reason)


def test_nothing_was_exchanged() -> None:
    expect(CHECK.judge(facts()), "skipped", "there is one process")
    expect(CHECK.judge(facts(why_alone="")), "pending", "nothing is exchanged at this decision")
    expect(CHECK.judge(facts(**{**ranks(tensors=False), "wrapping": None})), "pending", "nothing is exchanged")


def test_equal_tensors_pass() -> None:
    expect(CHECK.judge(facts(**ranks())), "pass")
    expect(CHECK.judge(facts(**ranks(gradients=False))), "pass")


def test_equal_gradients_do_not_explain_different_tensors() -> None:
    assert CHECK.judge(facts(**ranks(tensors=False, bypassed=True))).status == "fail"


def test_former_finding_of_its_own_explains_nothing() -> None:
    sent = ranks(tensors=False)
    status = CHECK.judge(facts(**sent)).status
    sent["ranks"] = dataclasses.replace(sent["ranks"], causes=("LP701",))
    assert CHECK.judge(facts(**sent)).status == status != "skipped"
