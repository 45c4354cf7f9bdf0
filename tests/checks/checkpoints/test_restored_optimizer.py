from __future__ import annotations

from typing import Any

from support.facts import ALL, bad, expect, facts, resumed

from lora_probe_callbacks.checks.checkpoints.restored_optimizer import CHECK, judge


def of(**changes: Any) -> Any:
    return judge(facts(restored=resumed(**changes)))


def test_state_of_another_tensor_fails() -> None:
    expect(
        of(wrong=((0, "layer.1.lora_A"), (2, "layer.0.lora_A")), lost=(1,)),
        "fail",
        "the optimizer's state of 2 of 4 adapter tensors is not theirs: layer.0.lora_A has that of layer.1.lora_A",
        slots=[0, 2],
        cause="state",
        got="2 states that differ from those saved under the same names",
        expected="0",
        fix="load_state_dict goes by position, not by name",
    )


def test_state_of_nobody_names_the_tensors() -> None:
    words = "of 2 of 4 adapter tensors is not theirs: layer.0.lora_B, layer.1.lora_B"
    verdict = of(wrong=((1, ""), (3, "")))
    assert verdict.message.endswith(words)


def test_state_that_a_framework_has_lost_fails() -> None:
    expect(
        of(lost=(0, 1, 2, 3)),
        "fail",
        "the optimizer holds no state for 4 of 4 adapter tensors, and did when last.ckpt was written",
        slots=ALL,
        cause="lost",
        got="no state",
        expected="state of 4 tensors",
        fix="load the optimizer's state after the optimizer was built",
    )


def test_state_that_a_loop_by_hand_does_not_restore_warns() -> None:
    expect(
        of(whole=False, lost=(0, 1, 2, 3)),
        "warn",
        "the optimizer starts without the state that it had when last.ckpt was written",
        slots=ALL,
        cause="lost",
        got="no state for 4 of 4 adapter tensors",
        expected="the saved state",
        fix="if a fresh optimizer is meant, pass ignore=('LP804',)",
    )


def test_state_that_is_lost_in_part_fails_in_any_loop() -> None:
    verdict = of(whole=False, lost=(0, 1, 2))
    assert (verdict.status, verdict.slots) == ("fail", {0, 1, 2})
    assert "for 3 of 4 adapter tensors" in verdict.message


def test_rates_of_other_groups_fail() -> None:
    expect(
        of(rates=(1, 3)),
        "fail",
        "2 adapter tensors have learning rates that were others' when last.ckpt was written: "
        "layer.0.lora_B, layer.1.lora_B",
        slots=[1, 3],
        cause="groups",
        got="the rates of other parameter groups",
        expected="each tensor's own",
        fix="build the parameter groups in the order they had when the optimizer was saved",
    )


def test_state_that_was_saved_passes() -> None:
    expect(of(), "pass")


def test_nothing_to_compare_is_not_judged() -> None:
    expect(CHECK.judge(facts()), "pending", "no saved state was restored")
    expect(of(optimizer=frozenset(), lost=(0,)), "skipped", "last.ckpt tells of no optimizer state")


def test_another_adapter_is_left_to_its_own_check() -> None:
    lost = resumed(fresh=True, lost=(0, 1, 2, 3))
    assert list(bad(facts(restored=lost))) == ["LP803"]
    assert list(bad(facts(restored=resumed(wrong=((0, "x"),))))) == ["LP804"]


def test_orphans_in_the_optimizer_are_left_to_their_own_check() -> None:
    what = facts(restored=resumed(lost=(0, 1)), replaced=(0, 1), foreign_in_optimizer=2)
    assert list(bad(what)) == ["LP202"]
