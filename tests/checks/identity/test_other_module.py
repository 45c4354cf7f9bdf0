from __future__ import annotations

import dataclasses

import pytest
from support.facts import ALL, GRADIENT, NONE, bad, expect, facts, unread

from lora_probe_callbacks.checks.identity.other_module import CHECK

MISSING = {"missing": 4, "had_gradient": False, "had_signal": False}
ON_THE_MODEL = "the forward on the module that holds the optimizer's tensors"


def test_loss_made_by_another_module_fails() -> None:
    what = facts(gradients=[NONE] * 4, history=MISSING, forward={"module": "copy", "holds_expected": False})
    assert list(bad(what)) == ["LP209"]
    words = "the loss was made by copy, not by the model whose adapter tensors the optimizer owns"
    expect(CHECK.judge(what), "fail", words, slots=ALL, got="the forward ran on copy", expected=ON_THE_MODEL)


def test_other_models_that_got_gradients_are_named() -> None:
    what = facts(gradients=[NONE] * 4, history=MISSING, forwards=(), elsewhere=("a", "b"))
    expect(
        CHECK.judge(what), "fail", "made by a, b, not", slots=ALL, got="the forward ran on a, b", expected=ON_THE_MODEL
    )


@pytest.mark.parametrize("missing", [3, 4])
def test_model_that_is_never_called_fails_after_four_steps(missing: int) -> None:
    what = facts(gradients=[NONE] * 4, history={**MISSING, "missing": 4}, at={2: {"missing": missing}}, forwards=())
    if missing < 4:
        expect(CHECK.judge(what), "pending", "the model was not called in this step")
        return
    expect(
        CHECK.judge(what),
        "fail",
        "the optimizer stepped 4 probed steps and the model that it owns was never called",
        slots=ALL,
        got="0 calls, every gradient None",
        expected="a call of the model in every step",
    )


def test_gradients_that_were_not_read_prove_nothing() -> None:
    what = unread(facts(history=MISSING, forwards=()))
    expect(CHECK.judge(what), "pending", "the model was not called in this step")


def test_gradients_that_arrive_pass_whoever_was_called() -> None:
    assert CHECK.judge(facts(gradients=[NONE, NONE, NONE, GRADIENT], forwards=())).status == "pass"
    expect(CHECK.judge(facts(forward={"holds_expected": False})), "pass")


def test_one_forward_on_the_model_is_enough() -> None:
    what = facts(gradients=[NONE] * 4, history=MISSING)
    foreign = facts(forward={"holds_expected": False}).forwards
    expect(CHECK.judge(dataclasses.replace(what, forwards=foreign + what.forwards)), "pass")


def test_calls_without_gradients_and_exceptions_are_pending() -> None:
    what = facts(gradients=[NONE] * 4, history=MISSING, forwards=())
    words = "the model was not called with gradients enabled"
    expect(CHECK.judge(dataclasses.replace(what, forwards_without_grad=1)), "pending", words)
    expect(CHECK.judge(dataclasses.replace(what, moment="exception")), "pending", words)


def test_moments_at_which_nothing_can_be_said() -> None:
    expect(CHECK.judge(facts(unobservable="it is compiled")), "pending", "it is compiled")
    expect(CHECK.judge(facts(moment="start")), "pending", "no step was made yet")
    expect(CHECK.judge(facts(units=0)), "pending", "no step was made yet")
    ended = facts(moment="end", ever_stepped=False, forwards=(), gradients=[NONE] * 4, history=MISSING)
    expect(CHECK.judge(ended), "pending", "the model was never called with gradients enabled")
    assert CHECK.judge(dataclasses.replace(ended, ever_stepped=True)).status == "fail"
    assert CHECK.judge(dataclasses.replace(ended, moment="step")).status == "fail"
    called = facts(
        forward={"holds_expected": False, "module": "copy"}, gradients=[NONE] * 4, moment="end", ever_stepped=False
    )
    assert CHECK.judge(called).status == "fail"


def test_model_that_is_called_passes() -> None:
    expect(CHECK.judge(facts()), "pass")
