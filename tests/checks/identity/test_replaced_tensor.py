from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, bad, expect, facts

from lora_probe_callbacks.checks.identity.replaced_tensor import CHECK
from lora_probe_callbacks.facts import CopiesFact


def test_optimizer_of_former_tensors_fails() -> None:
    what = facts(slot={"owner": None}, replaced=(0, 1, 2, 3), foreign_in_optimizer=6)
    assert list(bad(what)) == ["LP202"]
    expect(
        CHECK.judge(what),
        "fail",
        "the optimizer steps 6 tensors that the model does not hold, in place of 4 of its adapter tensors",
        "layer.0.lora_A, layer.0.lora_B, layer.1.lora_A and 1 more",
        slots=ALL,
        got="6 orphaned tensors of the same shapes in the optimizer",
        expected="the tensor objects that the model holds now",
    )


def test_layers_that_left_the_model_fail() -> None:
    verdict = CHECK.judge(facts(vanished=("a", "b")))
    expect(
        verdict,
        "fail",
        "2 adapter tensors that the optimizer steps have left the model with their layers: a, b",
        cause="vanished",
        got="2 tensors in the optimizer whose layers the model no longer holds",
        expected="the layers that the model had when training began",
        fix="find what exchanges modules while training runs",
    )


def test_without_an_optimizer_it_is_pending() -> None:
    expect(CHECK.judge(facts(optimizers=0, replaced=(0,))), "pending", "no optimizer is known yet")


def test_foreign_tensors_that_replace_nothing_pass() -> None:
    """A value head, a second model."""
    expect(CHECK.judge(facts(foreign_in_optimizer=3)), "pass")


def test_tensors_that_were_never_owned_are_left_to_the_neighbour() -> None:
    assert list(bad(facts(slot={"owner": None, "learning_rate": None}))) == ["LP201"]


# --- copies ---------------------------------------------------------------------------------------

WHO = (
    "the optimizer steps 5 tensors that the model does not hold, copies of 4 of its adapter tensors "
    "(layer.0.lora_A, layer.0.lora_B, layer.1.lora_A and 1 more): "
)


def copies(**changes: Any) -> Any:
    return facts(copies=CopiesFact(ALL, **changes), foreign_in_optimizer=5)


def test_copies_without_a_gradient_fail_in_their_own_step() -> None:
    what = copies(starved=(3, 30))
    assert list(bad(what)) == ["LP202"]
    expect(
        CHECK.judge(what),
        "fail",
        f"{WHO}the adapter got gradients, and the copies none",
        slots=ALL,
        cause="copies",
        got="equal values when training began, and no gradient on any copy when the optimizer stepped",
        expected="the tensor objects that the model holds now",
        seen=(3, 30),
    )


@pytest.mark.parametrize("still", [2, 3])
def test_copies_that_are_not_written_back_fail_after_three_steps(still: int) -> None:
    verdict = CHECK.judge(copies(still=still))
    if still < 3:
        expect(verdict, "pending", f"{WHO}judged once a step shows whether anything writes them back")
        return
    expect(
        verdict,
        "fail",
        f"{WHO}they move, and nothing writes them back to the adapter, which stands still",
        slots=ALL,
        cause="copies",
        got="the copies changed in 3 probed steps in a row, and not one adapter tensor",
        expected="the values of the copies, after each step",
        fix="parameter.copy_(master)",
    )


def test_copies_that_are_written_back_pass() -> None:
    expect(CHECK.judge(copies(followed=True)), "pass")
    expect(CHECK.judge(copies(followed=True, still=2)), "pass")
    assert CHECK.judge(copies(followed=True, still=3)).status == "fail"  # and are not any more


def test_copies_of_unknown_fate_are_pending() -> None:
    expect(CHECK.judge(copies()), "pending", WHO)


def test_orphans_come_before_copies() -> None:
    what = facts(replaced=(0,), foreign_in_optimizer=1, copies=CopiesFact(ALL, followed=True))
    assert CHECK.judge(what).slots == {0}
