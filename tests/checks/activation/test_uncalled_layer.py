from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, GRADIENT, NONE, ZERO, bad, expect, facts, unread

from lora_probe_callbacks.checks.activation.uncalled_layer import CHECK, judge
from lora_probe_callbacks.facts import Facts

SECOND_MISSING = [GRADIENT, GRADIENT, NONE, NONE]
SECOND_ZERO = [GRADIENT, GRADIENT, ZERO, ZERO]
LONG = (20,) * 4
NEVER = {"missing": 20, "had_gradient": False, "had_signal": False}


def second(**changes: Any) -> Facts:
    """The second layer was left out, and got no gradient."""
    return facts(**{"called": [True, False], "gradients": SECOND_MISSING, **changes})


def test_layer_passed_by_while_its_base_weight_is_used_fails() -> None:
    what = second(unit={"base_weight_used": True})
    assert list(bad(what)) == ["LP104"]
    expect(
        judge(what),
        "fail",
        "layer.1: the base weight is used, the adapted layer is never called",
        slots=[2, 3],
        got="0 calls, and the weight read by another operation",
        expected="the layer called in the training forward",
    )


def test_kernel_that_reads_the_adapter_itself_passes() -> None:
    assert not bad(facts(called=[True, False], unit={"base_weight_used": True}))


@pytest.mark.parametrize("zero", [3, 4])
def test_gradients_of_zero_stand_for_none_once_the_others_learn(zero: int) -> None:
    what = second(
        gradients=SECOND_ZERO,
        unit={"base_weight_used": True},
        history={"zero": zero},
        forward={"reached": ALL - {2, 3}},
    )
    assert (judge(what).status == "fail") == (zero == 4)


def test_one_zero_that_began_later_leaves_it_open() -> None:
    at = {2: {"zero": 4}, 3: {"zero": 3}}
    what = second(gradients=SECOND_ZERO, unit={"base_weight_used": True}, at=at, forward={"reached": frozenset()})
    assert judge(what).status == "pass"
    what = second(
        gradients=[*SECOND_ZERO[:3], NONE], unit={"base_weight_used": True}, at=at, forward={"reached": frozenset()}
    )
    assert judge(what).status == "pass"


def test_zeros_everywhere_are_left_to_zero_gradient() -> None:
    what = second(
        gradients=[ZERO] * 4, unit={"base_weight_used": True}, history={"zero": 9}, forward={"reached": frozenset()}
    )
    assert judge(what).status == "pass"


def test_graph_that_leads_to_the_adapter_shows_a_use() -> None:
    what = second(unit={"base_weight_used": True}, forward={"reached": frozenset([3])})
    assert judge(what).status == "pass"
    what = second(unit={"base_weight_used": True}, forward={"reached": None})
    assert judge(what).status == "fail"


@pytest.mark.parametrize(("step", "read", "status"), [(99, 20, "pending"), (100, 15, "pending"), (100, 16, "warn")])
def test_part_without_an_input_warns_after_a_hundred_steps(step: int, read: int, status: str) -> None:
    verdict = judge(second(history=NEVER, reads=(read,) * 4, step=step))
    if status == "pending":
        expect(verdict, "pending", "1 adapted layers have not run yet (layer.1)")
        return
    expect(
        verdict,
        "warn",
        "layer.1: never called in 100 steps",
        slots=[2, 3],
        cause="absent",
        got="0 calls",
        expected="called in some batch",
        fix="leave it out of target_modules",
    )


def test_both_tensors_must_have_been_read_for_long() -> None:
    assert judge(second(history=NEVER, reads=(16, 16, 16, 15), step=120)).status == "pending"


def test_part_that_learned_before_passes() -> None:
    expect(judge(second(step=120)), "pass")
    assert judge(second(history=NEVER, reads=LONG, at={3: {"had_signal": True}}, step=120)).status == "pass"


def test_layer_with_a_gradient_passes_though_it_was_not_called() -> None:
    expect(judge(facts(called=[True, False], history=NEVER, reads=LONG, step=120)), "pass")
    one = second(gradients=[GRADIENT, GRADIENT, GRADIENT, NONE], history=NEVER, reads=LONG, step=120)
    expect(judge(one), "pass")


def test_gradients_that_were_not_read_prove_nothing() -> None:
    expect(judge(unread(second(history=NEVER, reads=LONG, step=120))), "pass")


def test_frozen_by_intent_passes() -> None:
    expect(judge(second(history=NEVER, reads=LONG, slot={"frozen_by_intent": True}, step=120)), "pass")


def test_calls_that_cannot_be_seen_are_pending() -> None:
    expect(judge(facts(forwards=())), "pending", "no training forward whose layers can be seen")
    expect(judge(facts(forward={"calls": None}, unobservable="it is compiled")), "pending", "it is compiled")


def test_disabled_layers_are_left_to_their_own_check() -> None:
    what = facts(
        modes=["disabled"] * 2,
        called=[False, False],
        gradients=[NONE] * 4,
        unit={"base_weight_used": True},
        history={"missing": 1, "had_gradient": False, "had_signal": False},
    )
    assert list(bad(what)) == ["LP102"]
    expect(CHECK.judge(what), "pass")
