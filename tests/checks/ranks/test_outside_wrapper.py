from __future__ import annotations

import dataclasses

import pytest
from support.facts import ALL, WRAPPED, bad, expect, facts, ranks

from lora_probe_callbacks.checks.ranks.outside_wrapper import CHECK

WHO = "2 adapter tensors are not managed by DistributedDataParallel"


@pytest.mark.parametrize(("differ", "of"), [({"tensors": False}, "tensors"), ({"gradients": False}, "gradients")])
def test_tensors_beside_the_wrapper_fail_once_ranks_differ(differ: dict[str, bool], of: str) -> None:
    what = facts(**ranks(unmanaged=2, **differ))
    assert list(bad(what)) == ["LP703"]
    expect(
        CHECK.judge(what),
        "fail",
        f"{WHO}: it was made before they were there or could train",
        slots=ALL,
        got=f"a sample of the {of} differs by 5.0% of its norm between rank 0 and rank 1",
        expected="all 4 adapter tensors managed by DistributedDataParallel",
    )


def test_tensors_are_named() -> None:
    sent = ranks(unmanaged=2, tensors=False)
    sent["wrapping"] = dataclasses.replace(WRAPPED, unmanaged=(1, 3))
    assert f"{WHO} (layer.0.lora_B, layer.1.lora_B): " in CHECK.judge(facts(**sent)).message


def test_tensors_that_differ_are_told_before_gradients() -> None:
    verdict = CHECK.judge(facts(**ranks(unmanaged=2, tensors=False, gradients=False)))
    assert verdict.evidence["got"].startswith("a sample of the tensors")


def test_ranks_that_agree_so_far_are_pending() -> None:
    expect(CHECK.judge(facts(**ranks(unmanaged=2))), "pending", f"{WHO}; ranks have agreed so far")
    early = facts(**ranks(unmanaged=2, gradients=False, final=False))
    expect(CHECK.judge(early), "pending", f"{WHO}; ranks have agreed so far")


def test_reasons_not_to_judge() -> None:
    expect(CHECK.judge(facts()), "skipped", "there is one process")
    none = {**ranks(unmanaged=2, tensors=False), "wrapping": None}
    expect(CHECK.judge(facts(**none)), "pending", "nothing is exchanged")
    unwrapped = {**none, "wrapping": dataclasses.replace(WRAPPED, kind=None)}
    expect(CHECK.judge(facts(**unwrapped)), "skipped", "no wrapper is known")
    explained = ranks(unmanaged=2, tensors=False, bad=(("LP103", "fail"),))
    expect(CHECK.judge(facts(**explained)), "skipped", "explained by LP103")
    zero = {**ranks(unmanaged=2, tensors=False), "wrapping": dataclasses.replace(WRAPPED, kind="DeepSpeed")}
    expect(CHECK.judge(facts(**zero)), "skipped", "DeepSpeed keeps master copies and gradients of its own")


def test_former_finding_of_its_own_explains_nothing() -> None:
    sent = ranks(unmanaged=2, tensors=False)
    sent["ranks"] = dataclasses.replace(sent["ranks"], causes=("LP703",))
    assert CHECK.judge(facts(**sent)).status == "fail"


def test_managed_tensors_pass() -> None:
    expect(CHECK.judge(facts(**ranks())), "pass")


def test_managed_tensors_that_differ_are_left_to_the_neighbour() -> None:
    expect(CHECK.judge(facts(**ranks(tensors=False))), "pass")
