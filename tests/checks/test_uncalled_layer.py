from __future__ import annotations

from facts import GRADIENT, NONE, bad, facts

from lora_probe_callbacks.checks.uncalled_layer import judge

SECOND_MISSING = [GRADIENT, GRADIENT, NONE, NONE]
NEVER = {"read": 20, "missing": 20, "had_gradient": False, "had_signal": False}


def test_layer_passed_by_while_its_base_weight_is_used_fails() -> None:
    what = facts(called=[True, False], gradients=SECOND_MISSING, unit={"base_weight_used": True})
    assert list(bad(what)) == ["LP104"]


def test_kernel_that_reads_the_adapter_itself_passes() -> None:
    assert not bad(facts(called=[True, False], unit={"base_weight_used": True}))


def test_part_without_an_input_is_pending_for_a_hundred_steps() -> None:
    what = facts(called=[True, False], gradients=SECOND_MISSING, history=NEVER, step=50)
    assert judge(what).status == "pending"
    assert "layer.1" in judge(what).message
    assert judge(facts(called=[True, False], gradients=SECOND_MISSING, history=NEVER, step=120)).status == "warn"


def test_part_that_learned_before_passes() -> None:
    assert judge(facts(called=[True, False], gradients=SECOND_MISSING, step=120)).status == "pass"


def test_disabled_layers_are_left_to_their_own_check() -> None:
    what = facts(
        modes=["disabled"] * 2,
        gradients=[NONE] * 4,
        unit={"base_weight_used": True},
        history={"missing": 1, "had_gradient": False, "had_signal": False},
    )
    assert list(bad(what)) == ["LP102"]
