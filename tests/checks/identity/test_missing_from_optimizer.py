from __future__ import annotations

import pytest
from support.facts import ALL, bad, expect, facts

from lora_probe_callbacks.checks.identity.missing_from_optimizer import CHECK

NOBODY = {"owner": None, "learning_rate": None}


def test_tensors_in_no_optimizer_fail() -> None:
    what = facts(at={1: NOBODY, 3: NOBODY}, optimizer_tensors=2)
    assert list(bad(what)) == ["LP201"]
    expect(
        CHECK.judge(what),
        "fail",
        "2 of 4 adapter tensors are in no optimizer: layer.0.lora_B, layer.1.lora_B",
        slots=[1, 3],
        got="2 of 4 adapter tensors among the 2 tensors of 1 optimizer(s)",
        expected="4 of 4",
    )


def test_without_an_optimizer_it_is_pending() -> None:
    expect(CHECK.judge(facts(slot=NOBODY, optimizers=0)), "pending", "no optimizer is known yet")


@pytest.mark.parametrize("mode", ["active", "merged"])
def test_whole_adapter(mode: str) -> None:
    assert CHECK.judge(facts(slot=NOBODY, modes=[mode] * 2)).slots == ALL


def test_replaced_tensors_are_left_to_their_own_check() -> None:
    what = facts(slot=NOBODY, replaced=(0, 1, 2, 3), foreign_in_optimizer=4)
    expect(CHECK.judge(what), "pass")
    assert list(bad(what)) == ["LP202"]


@pytest.mark.parametrize("mode", ["inactive", "disabled"])
def test_inactive_layers_are_left_to_their_own_check(mode: str) -> None:
    expect(CHECK.judge(facts(slot=NOBODY, modes=[mode] * 2)), "pass")


def test_frozen_tensors_are_left_to_their_own_check() -> None:
    what = facts(slot={**NOBODY, "requires_grad": False})
    expect(CHECK.judge(what), "pass")
    assert list(bad(what)) == ["LP203"]


def test_tensors_frozen_by_intent_pass() -> None:
    expect(CHECK.judge(facts(at={0: {**NOBODY, "frozen_by_intent": True}})), "pass")


def test_owned_tensors_pass() -> None:
    expect(CHECK.judge(facts()), "pass")


def test_nothing_to_train_is_not_passed() -> None:
    what = facts(slot={"frozen_by_intent": True})
    expect(CHECK.judge(what), "pending", "no adapter tensor is expected to train")
