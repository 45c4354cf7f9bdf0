from __future__ import annotations

import pytest
from support.facts import ALL, GRADIENT, NONE, ZERO, bad, expect, facts, other

from lora_probe_callbacks.checks.identity.trainable_reference import CHECK

REFERENCE = {"declared": "reference", "was_active": True, "ever_changed": False}
MISSING = {"missing": 1, "had_gradient": False, "had_signal": False}


def test_trainable_reference_fails() -> None:
    what = facts(others=(other("ref", **REFERENCE, trainable=3, owned=2),))
    assert list(bad(what)) == ["LP207"]
    expect(
        CHECK.judge(what),
        "fail",
        "reference adapter 'ref' is trainable: 3 of its 4 tensors require gradients",
        cause="ref",
        got="3 of 4 trainable, 2 in an optimizer",
        expected="0 of 4 trainable",
        fix="call model.set_requires_grad('ref', requires_grad=False)",
    )
    assert "instead of" not in CHECK.judge(what).message
    assert "set_adapter('default')" not in CHECK.judge(what).fix


@pytest.mark.parametrize("gradients", [[NONE] * 4, [ZERO] * 4])
def test_reference_that_trains_in_the_place_of_the_adapter_is_one_fault(gradients: list[object]) -> None:
    reference = other("ref", **REFERENCE, trainable=4, active_now=True)
    what = facts(modes=["inactive"] * 2, gradients=gradients, history=MISSING, others=(reference,))
    assert list(bad(what)) == ["LP207"]
    expect(
        CHECK.judge(what),
        "fail",
        "and active instead of ['default']",
        slots=ALL,
        cause="ref",
        got="4 of 4 trainable, 0 in an optimizer",
        expected="0 of 4 trainable",
        fix="and set_adapter('default') before the training forward",
    )


def test_adapter_with_a_gradient_is_not_in_its_place() -> None:
    reference = other("ref", **REFERENCE, trainable=4, active_now=True)
    what = facts(modes=["inactive"] * 2, gradients=[NONE, NONE, NONE, GRADIENT], others=(reference,))
    assert not CHECK.judge(what).slots
    idle = other("ref", **REFERENCE, trainable=4)
    assert not CHECK.judge(facts(modes=["inactive"] * 2, gradients=[NONE] * 4, others=(idle,))).slots


def test_first_trainable_one_is_named() -> None:
    what = facts(
        others=(
            other("one", **REFERENCE),
            other("two", **REFERENCE, trainable=1),
            other("three", **REFERENCE, trainable=2),
        )
    )
    assert CHECK.judge(what).cause == "two"


def test_reference_active_at_the_start_is_pending() -> None:
    active = other("ref", **REFERENCE, trainable=4, active_now=True)
    expect(CHECK.judge(facts(others=(active,), moment="start")), "pending", "perhaps for its own forward")
    assert CHECK.judge(facts(others=(other("ref", **REFERENCE, trainable=4),), moment="start")).status == "fail"
    assert CHECK.judge(facts(others=(active,), moment="step")).status == "fail"


def test_without_a_declaration_it_is_skipped() -> None:
    expect(CHECK.judge(facts()), "skipped", "no reference adapter was declared")
    for declared in (None, "lagged"):
        assert CHECK.judge(facts(others=(other(declared=declared, trainable=4),))).status == "skipped"


def test_frozen_reference_passes() -> None:
    expect(CHECK.judge(facts(others=(other("ref", **REFERENCE),))), "pass")


def test_reference_that_moves_as_well_is_one_finding() -> None:
    reference = {**REFERENCE, "trainable": 4, "owned": 4, "changed": ("a",)}
    assert list(bad(facts(others=(other("ref", **reference),)))) == ["LP207"]
    unrelated = other("second", declared="reference", owned=4, changed=("b",))
    assert list(bad(facts(others=(unrelated, other("ref", **{**reference, "changed": ()}))))) == ["LP207", "LP404"]


def test_only_the_layers_that_the_reference_took_are_concerned() -> None:
    reference = other("ref", **REFERENCE, trainable=4, active_now=True)
    what = facts(modes=["inactive", "disabled"], gradients=[NONE] * 4, others=(reference,))
    assert CHECK.judge(what).slots == {0, 1}
