from __future__ import annotations

import dataclasses

import pytest
from support.facts import ALL, bad, expect, facts

from lora_probe_callbacks.checks.identity.frozen_adapter import CHECK

FROZEN = {"requires_grad": False}


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
    what = facts(at={1: FROZEN}, expected=("absent", "default"))
    assert CHECK.judge(what).status == "warn"


def test_part_that_is_frozen_warns() -> None:
    expect(
        CHECK.judge(facts(at={0: FROZEN, 1: FROZEN})),
        "warn",
        "2 of 4 adapter tensors are frozen: layer.0.lora_A, layer.0.lora_B",
        slots=[0, 1],
        got="2 of 4 trainable",
        expected="4 of 4, or the frozen ones declared",
        fix="pass frozen=(a part of their names,)",
    )


def test_lora_fa_passes() -> None:
    expect(CHECK.judge(facts(at={0: FROZEN, 2: FROZEN})), "pass")
    assert CHECK.judge(facts(at={0: FROZEN})).status == "warn"


def test_a_alone_is_no_lora_fa() -> None:
    what = facts(at={0: FROZEN, 1: {"role": "other"}, 2: FROZEN, 3: {"role": "other"}})
    assert CHECK.judge(what).status == "warn"


def test_turns_of_a_and_b_pass_once_b_has_learned() -> None:
    expect(CHECK.judge(facts(at={1: FROZEN, 3: FROZEN})), "pass")
    never = {**FROZEN, "had_signal": False}
    assert CHECK.judge(facts(at={1: FROZEN, 3: never})).status == "warn"
    without_a = facts(at={0: {"role": "other"}, 2: {"role": "other"}, 1: FROZEN, 3: FROZEN})
    assert CHECK.judge(without_a).status == "warn"


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
