from __future__ import annotations

from facts import ALL, bad, expect, facts

from lora_probe_callbacks.checks.replaced_tensor import CHECK


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
