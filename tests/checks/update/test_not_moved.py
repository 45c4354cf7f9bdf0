from __future__ import annotations

import dataclasses
import math

import pytest
from support.facts import ALL, GRADIENT, MOVED, NONE, STILL, ZERO, bad, expect, facts, received

from lora_probe_callbacks.checks.update.not_moved import CHECK, judge

UNMOVED = {"unmoved": 4}
EVERY = "moved by every step"


def still(row: int) -> str:
    return f"0 elements moved in {row} probed steps, with a learning rate and a gradient"


@pytest.mark.parametrize("unmoved", [3, 4])
def test_adapter_that_no_step_moves_fails_after_four(unmoved: int) -> None:
    what = facts(updates=[STILL] * 4, history={"unmoved": unmoved})
    if unmoved < 4:
        expect(judge(what), "pending", "4 adapter tensors were not moved by the last update")
        return
    assert list(bad(what)) == ["LP401"]
    words = "no step has moved the adapter, 4 probed steps now, though it has gradients and a learning rate"
    expect(judge(what), "fail", words, slots=ALL, got=still(4), expected=EVERY, of_update=True)


def test_gradient_that_was_gone_is_said() -> None:
    what = facts(updates=[STILL] * 4, history=UNMOVED)
    expect(
        judge(received(what, None, None, None, None)),
        "fail",
        slots=ALL,
        got=f"{still(4)} that was gone when step() returned: something clears it after the backward",
        expected=EVERY,
        of_update=True,
    )
    assert "gone" not in judge(received(what, None, 1.0, None, None)).evidence["got"]


def test_part_that_is_not_moved_warns() -> None:
    what = facts(updates=[MOVED, MOVED, STILL, STILL], at={2: {"unmoved": 5}, 3: {"unmoved": 3}})
    expect(
        judge(what),
        "warn",
        "1 adapter tensors were not moved in 5 probed steps in a row: layer.1.lora_A",
        slots=[2],
        got=still(5),
        expected=EVERY,
        fix="look for code that writes the old values back",
        of_update=True,
    )


def test_adapter_that_moved_before_warns() -> None:
    what = facts(updates=[STILL] * 4, history={**UNMOVED, "had_move": True})
    assert (judge(what).status, judge(what).slots) == ("warn", ALL)
    one = facts(updates=[STILL] * 4, history=UNMOVED, at={1: {"had_move": True}})
    assert judge(one).status == "warn"


def test_a_without_gradient_does_not_soften_the_verdict_on_b() -> None:
    """While no step moves B, every gradient of A is exactly zero."""
    a, b = {"zero": 5, "had_signal": False}, {"unmoved": 4}
    assert judge(facts(updates=[STILL] * 4, at={0: a, 1: b, 2: a, 3: b})).status == "fail"


def test_tensors_that_nobody_stepped_are_not_judged() -> None:
    what = facts(updates=[STILL, None, STILL, None], history=UNMOVED)
    assert judge(what).slots == {0, 2}
    nothing = judge(facts(updates=[None] * 4, history=UNMOVED))
    expect(nothing, "pending", "no tensor had a gradient that could have moved it")


def test_frozen_by_intent_is_not_judged() -> None:
    what = facts(updates=[STILL] * 4, history=UNMOVED, at={0: {"frozen_by_intent": True}})
    assert judge(what).slots == {1, 2, 3}


# --- put back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("put_back", [2, 3])
def test_values_put_back_fail_although_every_step_moves_them(put_back: int) -> None:
    what = facts(history={"put_back": put_back, "had_move": True})
    if put_back < 3:
        expect(judge(what), "pass")
        return
    assert list(bad(what)) == ["LP401"]
    expect(
        judge(what),
        "fail",
        "4 adapter tensors are put back after every step: 4 probed steps began with the same values",
        slots=ALL,
        cause="put back",
        got="moved by each step, and equal before all of them",
        expected="what the step wrote",
        fix="look for code that loads, resets or copies adapter values",
        of_update=True,
    )


def test_part_that_is_put_back_warns() -> None:
    what = facts(at={1: {"put_back": 3}, 3: {"put_back": 2}}, history={"had_move": True})
    assert (judge(what).status, judge(what).slots) == ("warn", {1})


@pytest.mark.parametrize("without", ["zero", "missing"])
def test_what_has_no_gradient_does_not_count_as_learning(without: str) -> None:
    """A goes on by weight decay while B is put back to zero."""
    what = facts(at={1: {"put_back": 3}, 3: {"put_back": 3}, 0: {without: 1}, 2: {without: 1}})
    assert (judge(what).status, judge(what).slots) == ("fail", {1, 3})


# --- no step at all ------------------------------------------------------------------------------

NO_STEP = {"update": None, "ever_stepped": False}


@pytest.mark.parametrize("skipped", [2, 3])
def test_run_that_ends_without_a_step_fails(skipped: int) -> None:
    what = facts(moment="end", skipped_in_a_row=skipped, **NO_STEP)
    if skipped < 3:
        expect(judge(what), "pending", "no update was seen yet")
        return
    expect(
        judge(what),
        "fail",
        "no optimizer that owns the adapter has stepped: 4 backward passes and not one update",
        slots=ALL,
        cause="no step",
        got="0 calls of optimizer.step()",
        expected="a step after the backward passes that it accumulates",
        fix="call step() on the optimizer that was given to the probe",
    )


@pytest.mark.parametrize("skipped", [15, 16])
def test_gradients_thrown_away_sixteen_times_fail_before_the_end(skipped: int) -> None:
    assert (judge(facts(skipped_in_a_row=skipped, **NO_STEP)).status == "fail") == (skipped == 16)


def test_accumulation_up_to_the_end_counts_its_backwards() -> None:
    what = facts(moment="end", **NO_STEP)
    four = dataclasses.replace(what, forwards=what.forwards * 4)
    assert judge(four).status == "fail"
    assert judge(dataclasses.replace(what, forwards=what.forwards * 3)).status == "pending"
    unused = facts(forward={"received": False}).forwards
    assert judge(dataclasses.replace(what, forwards=what.forwards * 3 + unused * 3)).status == "pending"


def test_steps_that_a_scaler_skips_are_left_to_skipped_steps() -> None:
    assert judge(facts(moment="end", scaler=True, skipped_in_a_row=20, **NO_STEP)).status == "pending"
    assert judge(facts(scaler=True, skipped_in_a_row=20, **NO_STEP)).status == "pending"


GIVEN = "call step() on the optimizer that was given to the probe"


@pytest.mark.parametrize(
    ("passes", "accumulation", "status"),
    [
        (16, None, "warn"),
        (127, None, "warn"),
        (128, None, "fail"),
        (16, 8, "fail"),
        (16, 1, "fail"),
        (16, 9, "warn"),
        (17, 9, "warn"),
        (18, 9, "fail"),
    ],
)
def test_backward_passes_without_a_step_warn_and_fail_in_the_end(passes: int, accumulation: int, status: str) -> None:
    what = facts(moment="waiting", passes=passes, accumulation=accumulation, **NO_STEP)
    words = f"no optimizer that owns the adapter has stepped: {passes} backward passes and not one update"
    fix = f"{GIVEN}, or give it the one that the loop steps"
    if status == "warn":
        fix = (
            f"if gradients are accumulated over more than {passes} backward passes nothing is wrong so far; else "
            f"{GIVEN}, and see that an accumulation is not longer than the data"
        )
    assert judge(what).fix == fix
    expect(
        judge(what),
        status,
        words,
        slots=ALL,
        cause="no step",
        got="0 calls of optimizer.step()",
        expected="a step after the backward passes that it accumulates",
        fix=fix,
    )


@pytest.mark.parametrize("passes", [3, 4])
def test_few_backward_passes_say_nothing(passes: int) -> None:
    assert judge(facts(moment="waiting", passes=passes, **NO_STEP)).status == ("warn" if passes == 4 else "pending")
    assert judge(facts(passes=passes, **NO_STEP)).status == "pending"


# --- one optimizer of several --------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "status"), [(15, "pass"), (16, "warn"), (127, "warn"), (128, "fail")])
def test_optimizer_that_never_steps_while_another_does(steps: int, status: str) -> None:
    what = facts(at={2: {"owner": 1}, 3: {"owner": 1}}, steps_of=(steps, 0), optimizers=2)
    if status == "pass":
        expect(judge(what), "pass")
        return
    assert list(bad(what)) == ["LP401"]
    expect(
        judge(what),
        status,
        f"the optimizer of 2 adapter tensors has not stepped once, while another has made {steps} steps: "
        "layer.1.lora_A, layer.1.lora_B",
        slots=[2, 3],
        cause="optimizer",
        got="0 calls of its step()",
        expected="a step after the backward passes that it accumulates",
        fix="call step() on each optimizer that owns a part of the adapter; if its turn is still to come nothing is",
    )


def test_optimizer_whose_turn_may_come_is_left_alone() -> None:
    own = {"at": {2: {"owner": 1}, 3: {"owner": 1}}, "steps_of": (20, 0), "optimizers": 2}
    expect(judge(facts(modes=["active", "inactive"], **own)), "pass")
    expect(judge(facts(called=[True, False], **own)), "pass")
    expect(judge(facts(moment="end", **own)), "pass")
    frozen = {**own, "at": {i: {"owner": 1, "requires_grad": False} for i in (2, 3)}}
    expect(judge(facts(**frozen)), "pass")
    kept = {**own, "at": {i: {"owner": 1, "frozen_by_intent": True} for i in (2, 3)}}
    expect(judge(facts(**kept)), "pass")
    assert judge(facts(forward={"calls": None}, **own)).status == "warn", "what cannot be seen may have run"


def test_idle_optimizer_is_told_where_no_update_was_read_and_after_worse() -> None:
    own = {"at": {2: {"owner": 1}, 3: {"owner": 1}}, "steps_of": (20, 0), "optimizers": 2}
    assert judge(facts(update=None, **own)).cause == "optimizer"
    lost = {i: {"owner": 1} for i in (2, 3)} | {0: {"unmoved": 4}, 1: {"unmoved": 4}}
    still_too = facts(updates=[STILL, STILL, None, None], **{**own, "at": lost})
    assert judge(still_too).cause == "", "what no step moves is the nearer cause"


def test_steps_of_an_optimizer_without_an_adapter_do_not_count() -> None:
    what = facts(steps_of=(0, 20), optimizers=2, moment="waiting", passes=16, **NO_STEP)
    assert judge(what).cause == "no step"
    stepped = facts(steps_of=(1, 20), optimizers=2, moment="waiting", passes=16, **NO_STEP)
    expect(judge(stepped), "pending", "no update was seen yet")


def test_later_without_an_update_is_pending() -> None:
    assert judge(facts(moment="end", skipped_in_a_row=20, update=None)).status == "pending"


# --- neighbours ----------------------------------------------------------------------------------


def test_adapter_that_moves_passes() -> None:
    assert not bad(facts())
    expect(CHECK.judge(facts()), "pass")


def test_zero_gradients_are_left_to_their_own_check() -> None:
    what = facts(updates=[STILL] * 4, gradients=[ZERO] * 4, history={"unmoved": 4, "zero": 5, "had_signal": False})
    assert list(bad(what)) == ["LP303"]


def test_missing_gradients_are_left_to_their_own_check() -> None:
    history = {"unmoved": 4, "missing": 5, "had_gradient": False, "had_signal": False}
    assert list(bad(facts(updates=[STILL] * 4, gradients=[NONE] * 4, history=history))) == ["LP301"]


def test_rate_of_zero_is_left_to_its_own_check() -> None:
    history = {"unmoved": 4, "rate_zero": 5, "had_rate": False}
    what = facts(updates=[STILL] * 4, gradients=[GRADIENT] * 4, slot={"learning_rate": 0.0}, history=history)
    assert list(bad(what)) == ["LP208"]


def test_steps_that_a_scaler_skips_are_no_backward_passes() -> None:
    what = facts(moment="end", scaler=True, **NO_STEP)
    assert judge(dataclasses.replace(what, forwards=what.forwards * 3)).status == "pending"


def test_gradient_that_is_nan_was_there() -> None:
    what = facts(updates=[STILL] * 4, history=UNMOVED)
    assert "gone" not in judge(received(what, *[math.nan] * 4)).evidence["got"]
