from __future__ import annotations

import pytest
from support.facts import MOVED, STILL, bad, expect, facts, other

from lora_probe_callbacks.checks.update.frozen_tensor_moved import CHECK
from lora_probe_callbacks.facts import BaseDrift


def test_reference_that_moved_fails() -> None:
    what = facts(others=(other("ref", declared="reference", changed=("a", "b"), owned=1),))
    assert list(bad(what)) == ["LP404"]
    expect(
        CHECK.judge(what),
        "fail",
        "reference adapter 'ref' moved in the last step: 2 of 4 tensors, a, b",
        cause="ref",
        got="2 tensors changed, 1 in an optimizer",
        expected="0",
        of_update=True,
    )


def test_idle_adapter_that_an_optimizer_steps_fails() -> None:
    what = facts(others=(other("old", changed=("a", "b"), owned=3),))
    expect(
        CHECK.judge(what),
        "fail",
        "adapter 'old' is not active and moved all the same: the optimizer owns 3 of its tensors",
        cause="old",
        got="2 of 4 tensors changed in a step in which the adapter was inactive",
        expected="0",
        fix="give the optimizer only what trains",
        of_update=True,
    )


@pytest.mark.parametrize(
    "healthy",
    [
        {"changed": ()},
        {"owned": 0},
        {"active_now": True},
        {"declared": "lagged"},
        {"declared": "reference", "changed": ()},
    ],
)
def test_adapter_that_may_move_passes(healthy: dict[str, object]) -> None:
    expect(CHECK.judge(facts(others=(other(**{"owned": 4, "changed": ("a",), **healthy}),))), "pass")


def test_second_adapter_is_looked_at_as_well() -> None:
    what = facts(others=(other("still"), other("moved", changed=("a",), owned=1)))
    assert CHECK.judge(what).cause == "moved"


def test_tensor_declared_frozen_that_moved_fails() -> None:
    what = facts(at={2: {"frozen_by_intent": True}})
    expect(
        CHECK.judge(what),
        "fail",
        "1 adapter tensors that were declared frozen moved: layer.1.lora_A",
        slots=[2],
        cause="frozen",
        got="1 moved",
        expected="0",
        of_update=True,
    )


@pytest.mark.parametrize("update", [STILL, None])
def test_tensor_declared_frozen_that_stands_still_passes(update: object) -> None:
    expect(CHECK.judge(facts(at={2: {"frozen_by_intent": True}}, updates=[MOVED, MOVED, update, MOVED])), "pass")
    expect(CHECK.judge(facts(at={2: {"frozen_by_intent": True}}, update=None)), "pass")


def test_values_that_are_not_finite_are_left_to_their_own_check() -> None:
    """inf - inf is nan: whether it has moved cannot be told."""
    broken = MOVED._replace(norm=float("nan"))
    what = facts(at={2: {"frozen_by_intent": True}}, updates=[MOVED, MOVED, broken, MOVED])
    expect(CHECK.judge(what), "pass")
    assert list(bad(what)) == ["LP501"]


@pytest.mark.parametrize(
    ("relative", "quantised", "status", "below"),
    [
        (0.0049, False, "pass", ""),
        (0.005, False, "warn", "below 0.005"),
        (0.0199, False, "warn", "below 0.005"),
        (0.02, False, "fail", "below 0.005"),
        (0.0099, True, "pass", ""),
        (0.01, True, "warn", "below 0.01"),
        (1.0, True, "warn", "below 0.01"),
    ],
)
def test_drift_of_the_base(relative: float, quantised: bool, status: str, below: str) -> None:
    verdict = CHECK.judge(facts(base_drift=BaseDrift(relative, "layer.0", 3, quantised)))
    if status == "pass":
        expect(verdict, "pass")
        return
    expect(
        verdict,
        status,
        f"the frozen base weight of layer.0 has drifted by {relative:.1%} since training began",
        cause="base",
        got=f"relative change {relative:.2e}" + (" of its quantised codes" if quantised else ""),
        expected=below,
        fix="do not give a 16-bit or quantised weight back exactly",
    )


def test_codes_in_the_order_for_inference_are_not_compared() -> None:
    drift = BaseDrift(0.5, "layer.0", 3, quantised=True)
    words = "4-bit weights are packed for inference, in which their codes stand in another order"
    expect(CHECK.judge(facts(base_drift=drift, packed=(1, 4))), "skipped", words)
    assert CHECK.judge(facts(base_drift=drift, packed=(0, 4))).status == "warn"
    whole = BaseDrift(0.5, "layer.0", 3, quantised=False)
    assert CHECK.judge(facts(base_drift=whole, packed=(1, 4))).status == "fail"


def test_trainable_base_is_left_to_its_own_check() -> None:
    what = facts(base_drift=BaseDrift(0.5, "layer.0", 0, quantised=False), trainable_bases=("layer.0",))
    expect(CHECK.judge(what), "pass")


def test_before_the_first_step_it_is_pending() -> None:
    moved = (other("ref", declared="reference", changed=("a",)),)
    expect(CHECK.judge(facts(moment="start", others=moved)), "pending", "no step was made yet")
    expect(CHECK.judge(facts(moment="end", ever_stepped=False, others=moved)), "pending", "no step was made yet")
    assert CHECK.judge(facts(moment="end", others=moved)).status == "fail"
    assert CHECK.judge(facts(moment="step", ever_stepped=False, others=moved)).status == "fail"


def test_nothing_that_must_stay_frozen_passes() -> None:
    expect(CHECK.judge(facts()), "pass")
