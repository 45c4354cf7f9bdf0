from __future__ import annotations

import dataclasses

from facts import MOVED, NONE, STILL, ZERO, bad, facts

from lora_probe_callbacks.checks.not_moved import judge

UNMOVED = {"unmoved": 4}


def test_adapter_that_no_step_moves_fails() -> None:
    what = facts(updates=[STILL] * 4, history=UNMOVED)
    assert list(bad(what)) == ["LP401"]
    assert judge(what).status == "fail"


def test_a_without_gradient_does_not_soften_the_verdict_on_b() -> None:
    """While no step moves B, every gradient of A is exactly zero."""
    what = facts(updates=[STILL] * 4)
    a = dataclasses.replace(what.history[0], zero=5, had_signal=False)
    b = dataclasses.replace(what.history[0], unmoved=4)
    assert judge(dataclasses.replace(what, history=(a, b, a, b))).status == "fail"


def test_values_put_back_fail_although_every_step_moves_them() -> None:
    what = facts(updates=[MOVED] * 4, history={"put_back": 3, "had_move": True})
    assert list(bad(what)) == ["LP401"]
    assert "put back" in judge(what).message


def test_three_steps_are_not_enough() -> None:
    assert judge(facts(updates=[STILL] * 4, history={"unmoved": 3})).status == "pending"
    assert judge(facts(history={"put_back": 2, "had_move": True})).status == "pass"


def test_adapter_that_moves_passes() -> None:
    assert not bad(facts())


def test_zero_gradients_are_left_to_their_own_check() -> None:
    what = facts(updates=[STILL] * 4, gradients=[ZERO] * 4, history={"unmoved": 4, "zero": 5, "had_signal": False})
    assert list(bad(what)) == ["LP303"]


def test_missing_gradients_are_left_to_their_own_check() -> None:
    what = facts(
        updates=[STILL] * 4,
        gradients=[NONE] * 4,
        history={"unmoved": 4, "missing": 5, "had_gradient": False, "had_signal": False},
    )
    assert list(bad(what)) == ["LP301"]


def test_rate_of_zero_is_left_to_its_own_check() -> None:
    history = {"unmoved": 4, "rate_zero": 5, "had_rate": False}
    what = facts(updates=[STILL] * 4, slot={"learning_rate": 0.0}, history=history)
    assert list(bad(what)) == ["LP208"]
