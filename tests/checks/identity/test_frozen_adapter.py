from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.facts import ALL, bad, expect, facts

from lora_probe_callbacks.checks.identity.frozen_adapter import CHECK

FROZEN = {"requires_grad": False}
LEFT_OUT = {**FROZEN, "owner": None}  # frozen before the optimizer was built
LATER = {**FROZEN, "had_move": True, "frozen": 1, "frozen_since": 5}


def test_frozen_adapter_fails() -> None:
    what = facts(slot=FROZEN)
    assert list(bad(what)) == ["LP203"]
    words = "all 4 tensors of adapter 'default' are frozen (requires_grad=False)"
    expect(CHECK.judge(what), "fail", words, slots=ALL, cause="default", got="0 of 4 trainable", expected="4 of 4")


@pytest.mark.parametrize("mode", ["active", "merged"])
def test_state_in_which_it_is_judged(mode: str) -> None:
    assert CHECK.judge(facts(slot=FROZEN, modes=[mode] * 2)).status == "fail"


@pytest.mark.parametrize("mode", ["inactive", "disabled"])
def test_inactive_adapter_is_pending(mode: str) -> None:
    verdict = CHECK.judge(facts(slot=FROZEN, modes=[mode] * 2))
    expect(verdict, "pending", "not active at this moment, or its optimizer has not had its turn")


def test_one_of_two_expected_adapters_is_enough() -> None:
    what = facts(
        at={2: {**FROZEN, "adapter": "second"}, 3: {**FROZEN, "adapter": "second"}}, expected=("default", "second")
    )
    evidence = {"got": "0 of 2 trainable", "expected": "2 of 2"}
    expect(CHECK.judge(what), "fail", "all 2 tensors of adapter 'second'", slots=[2, 3], cause="second", **evidence)


def test_expected_adapter_without_a_judged_tensor_is_no_failure() -> None:
    what = facts(at={1: LEFT_OUT}, expected=("absent", "default"))
    assert CHECK.judge(what).status == "warn"


def test_part_that_is_frozen_warns() -> None:
    expect(
        CHECK.judge(facts(at={0: LEFT_OUT, 1: LEFT_OUT})),
        "warn",
        "2 of 4 adapter tensors are frozen: layer.0.lora_A, layer.0.lora_B",
        slots=[0, 1],
        got="2 of 4 trainable",
        expected="4 of 4, or the frozen ones declared",
        fix="pass frozen=(a part of their names,)",
    )


def test_lora_fa_passes() -> None:
    expect(CHECK.judge(facts(at={0: FROZEN, 2: FROZEN})), "pass")
    assert CHECK.judge(facts(at={0: LEFT_OUT})).status == "warn"


@pytest.mark.parametrize(
    ("more", "status"),
    [({}, "pending"), ({"step": 99}, "pending"), ({"step": 100}, "warn"), ({"moment": "end"}, "warn")],
)
def test_part_that_the_optimizer_owns_may_wait_for_its_turn(more: dict[str, Any], status: str) -> None:
    assert CHECK.judge(facts(at={0: FROZEN, 1: FROZEN}, **more)).status == status


def test_what_has_trained_and_is_frozen_later_is_named_with_its_step() -> None:
    expect(
        CHECK.judge(facts(at={0: LATER, 2: LATER})),
        "warn",
        "2 of 4 adapter tensors have trained and are frozen since step 5: layer.0.lora_A, layer.1.lora_A",
        slots=[0, 2],
        cause="later",
        got="requires_grad=False since step 5, and nothing else thawed",
        expected="what trained goes on to train",
        fix="look for what sets requires_grad",
    )


@pytest.mark.parametrize(("thawed_at", "status"), [(4, "warn"), (5, "pass"), (7, "pass")])
def test_where_something_thaws_in_exchange_it_is_a_turn(thawed_at: int, status: str) -> None:
    thawed = {"thawed": True, "thawed_at": thawed_at}
    assert CHECK.judge(facts(at={0: LATER, 1: thawed, 2: LATER, 3: thawed})).status == status


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"others_train": True}, "pending"),
        ({"thaw_announced": True}, "pending"),
        ({}, "fail"),
        ({"others_train": True, "moment": "end"}, "fail"),
        ({"thaw_announced": True, "moment": "end"}, "fail"),
    ],
)
def test_whole_adapter_may_be_thawed_later_where_something_else_trains(more: dict[str, Any], status: str) -> None:
    assert CHECK.judge(facts(slot=FROZEN, history={"had_signal": False}, **more)).status == status
    left_out = facts(slot=LEFT_OUT, history={"had_signal": False}, **more)
    assert CHECK.judge(left_out).status == (status if more == {"thaw_announced": True} else "fail")


def test_a_alone_is_no_lora_fa() -> None:
    what = facts(at={0: LEFT_OUT, 1: {"role": "other"}, 2: LEFT_OUT, 3: {"role": "other"}})
    assert CHECK.judge(what).status == "warn"


def test_toggled_optimizers_are_asked_in_their_own_turn() -> None:
    what = facts(slot={**FROZEN, "owner": 1}, optimizers=2, optimizer=0)
    assert CHECK.judge(what).status == "pending"
    assert CHECK.judge(dataclasses.replace(what, optimizer=1)).status == "fail"
    assert CHECK.judge(dataclasses.replace(what, optimizers=1)).status == "fail"
    assert CHECK.judge(facts(slot={**FROZEN, "owner": None}, optimizers=2, optimizer=0)).status == "fail"


def test_frozen_by_intent_passes() -> None:
    expect(CHECK.judge(facts(at={1: {**FROZEN, "frozen_by_intent": True}})), "pass")


def test_trainable_adapter_passes() -> None:
    expect(CHECK.judge(facts()), "pass")


def test_disabled_adapter_is_left_to_the_neighbour() -> None:
    assert list(bad(facts(slot=FROZEN, modes=["disabled"] * 2))) == ["LP102"]


def test_first_optimizer_is_not_asked_at_the_event_of_the_second() -> None:
    what = facts(optimizers=2, optimizer=1, slot={"owner": 0, "requires_grad": False})
    expect(CHECK.judge(what), "pending", "its optimizer has not had its turn")
