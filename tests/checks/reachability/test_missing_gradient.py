from __future__ import annotations

import pytest
from support.facts import ALL, GRADIENT, NONE, bad, expect, facts, unread

from lora_probe_callbacks.checks.reachability.missing_gradient import CHECK

NEVER = {"missing": 1, "had_gradient": False, "had_signal": False}
IN_GRAPH = {"reached": ALL}


def test_adapter_in_the_graph_without_a_gradient_fails() -> None:
    what = facts(gradients=[NONE] * 4, history=NEVER, forward=IN_GRAPH)
    assert list(bad(what)) == ["LP302"]
    words = "all 4 adapter tensors got no gradient (None), although the layers ran"
    expect(CHECK.judge(what), "fail", words, slots=ALL, got="4 of 4 gradients None", expected="0")
    assert CHECK.judge(what).message == words


def test_calls_without_gradients_are_counted() -> None:
    what = facts(gradients=[NONE] * 4, history=NEVER, forward=IN_GRAPH, forwards_without_grad=2)
    assert CHECK.judge(what).message.endswith("; the model was called 2 times without gradients")


@pytest.mark.parametrize(("missing", "had", "status"), [(3, False, "pending"), (4, False, "fail"), (4, True, "warn")])
def test_part_is_judged_over_time(missing: int, had: bool, status: str) -> None:
    lost = {"missing": missing, "had_gradient": had}
    verdict = CHECK.judge(facts(gradients=[GRADIENT, GRADIENT, NONE, GRADIENT], at={2: lost}, forward=IN_GRAPH))
    assert verdict.status == status
    assert "1 adapter tensors (layer.1.lora_A) got no gradient" in verdict.message
    if status != "pending":
        assert (verdict.slots, verdict.evidence) == ({2}, {"got": "1 of 4 gradients None", "expected": "0"})


@pytest.mark.parametrize("how", ["checkpoint", "no_grad"])
def test_reentrant_checkpoint_gets_its_own_advice(how: str) -> None:
    why = "CheckpointFunctionBackward hides it"
    forward = {"reached": None, "why_unknown": why} if how == "checkpoint" else {**IN_GRAPH, "with_grad": frozenset()}
    got = f"4 of 4 gradients None; {why}" if how == "checkpoint" else "4 of 4 gradients None"
    verdict = CHECK.judge(facts(gradients=[NONE] * 4, history=NEVER, forward=forward))
    expect(verdict, "fail", slots=ALL, got=got, expected="0", fix="pass use_reentrant=False")
    inside = "without gradients enabled, inside the training forward"
    assert (inside in verdict.message) == (how == "no_grad")


def test_other_reasons_get_the_general_advice() -> None:
    forward = {"reached": None, "why_unknown": "a compiled graph"}
    expect(
        CHECK.judge(facts(gradients=[NONE] * 4, history=NEVER, forward=forward)),
        "fail",
        slots=ALL,
        got="4 of 4 gradients None",
        expected="0",
    )
    partly = facts(gradients=[NONE] * 4, history=NEVER, forward={**IN_GRAPH, "with_grad": frozenset([0])})
    assert not CHECK.judge(partly).fix


def test_what_is_left_to_the_neighbours() -> None:
    left = {"gradients": [NONE] * 4, "history": NEVER}
    nothing = "no gradient that should be there was read"
    expect(CHECK.judge(facts(**left, slot={"requires_grad": False}, forward=IN_GRAPH)), "pending", nothing)  # LP203
    expect(CHECK.judge(facts(**left, called=[False, False], forward=IN_GRAPH)), "pending", nothing)  # LP104
    expect(CHECK.judge(facts(**left)), "pending", nothing)  # LP301
    frozen = facts(**left, at={0: {"frozen_by_intent": True}}, forward=IN_GRAPH)
    assert CHECK.judge(frozen).slots == {1, 2, 3}


def test_calls_that_cannot_be_seen_do_not_matter() -> None:
    what = facts(gradients=[NONE] * 4, history=NEVER, forward={**IN_GRAPH, "calls": None})
    assert CHECK.judge(what).status == "fail"


def test_nothing_was_read() -> None:
    expect(CHECK.judge(unread(facts())), "pending", "no gradient was read at this decision")


def test_tensors_that_were_not_read_are_not_counted() -> None:
    verdict = CHECK.judge(facts(gradients=[None, NONE, NONE, NONE], history=NEVER, forward=IN_GRAPH))
    assert (verdict.status, verdict.evidence["got"]) == ("fail", "3 of 3 gradients None")
    assert "all 3 adapter tensors" in verdict.message


def test_model_that_was_not_called_is_left_to_other_module() -> None:
    what = facts(gradients=[NONE] * 4, history=NEVER, forwards=())
    expect(CHECK.judge(what), "pending", "the model was not called in this step")
    foreign = facts(gradients=[NONE] * 4, history=NEVER, forward={"holds_expected": False})
    expect(CHECK.judge(foreign), "pending", "the model was not called in this step")
    hidden = facts(gradients=[NONE] * 4, history=NEVER, forwards=(), unobservable="it is compiled")
    assert CHECK.judge(hidden).status == "fail"


@pytest.mark.parametrize("missing", [15, 16])
def test_calls_without_gradients_alone_warn_after_sixteen_steps(missing: int) -> None:
    history = {**NEVER, "missing": 16}
    what = facts(
        gradients=[NONE] * 4, history=history, at={1: {"missing": missing}}, forwards=(), forwards_without_grad=3
    )
    if missing < 16:
        expect(CHECK.judge(what), "pending", "the model was called without gradients only, in 15 probed step(s)")
        return
    expect(
        CHECK.judge(what),
        "warn",
        "all 4 adapter tensors got no gradient (None) in 16 probed steps",
        slots=ALL,
        cause="without gradients",
        got="3 calls without gradients in this step, 0 with",
        expected="a call with gradients in every step",
        fix="take no_grad, inference_mode and set_grad_enabled(False) away",
    )


@pytest.mark.parametrize("missing", [3, 4])
def test_calls_without_gradients_fail_where_nothing_else_has_one_either(missing: int) -> None:
    own = {"forwards": (), "forwards_without_grad": 3, "no_gradient_at_all": True}
    what = facts(gradients=[NONE] * 4, history={**NEVER, "missing": 4}, at={1: {"missing": missing}}, **own)
    if missing < 4:
        words = "the model was called without gradients only, in 3 probed step(s): they may warm up a head"
        expect(CHECK.judge(what), "pending", words)
        return
    assert list(bad(what)) == ["LP302"]
    fix = (
        "take no_grad, inference_mode and set_grad_enabled(False) away from the forward that makes the loss; "
        "loss.requires_grad_(True) silences the error and trains nothing"
    )
    assert CHECK.judge(what).fix == fix
    expect(
        CHECK.judge(what),
        "fail",
        "all 4 adapter tensors got no gradient (None) in 4 probed steps: every call of the model was under no_grad or "
        "inference_mode, and nothing else has a gradient either: the loss carries no graph",
        slots=ALL,
        cause="without gradients",
        got="3 calls without gradients in this step, 0 with",
        expected="a call with gradients in every step",
        fix=fix,
    )
    partly = facts(gradients=[NONE, GRADIENT, NONE, NONE], history={**NEVER, "missing": 4}, **own)
    assert CHECK.judge(partly).slots == {0, 2, 3}
    frozen = facts(gradients=[NONE] * 4, history={**NEVER, "missing": 4}, at={0: {"requires_grad": False}}, **own)
    assert CHECK.judge(frozen).slots == {1, 2, 3}


def test_warm_up_that_trains_something_else_says_so() -> None:
    what = facts(gradients=[NONE] * 4, history={**NEVER, "missing": 16}, forwards=(), forwards_without_grad=3)
    assert CHECK.judge(what).message.endswith("inference_mode, and the loss trains something else")
    assert CHECK.judge(what).fix == (
        "if these steps are a warm-up of something else nothing is wrong; else take no_grad, inference_mode and "
        "set_grad_enabled(False) away from the forward that makes the loss"
    )


def test_warm_up_of_a_head_is_no_fault_of_others() -> None:
    left = {"history": {**NEVER, "missing": 20}, "forwards_without_grad": 3}
    words = "the model was not called in this step"
    expect(CHECK.judge(facts(gradients=[NONE] * 4, forwards=(), elsewhere=("a",), **left)), "pending", words)
    expect(CHECK.judge(facts(gradients=[GRADIENT] * 4, forwards=(), **left)), "pending", words)
    expect(CHECK.judge(facts(gradients=[NONE] * 4, forward={"holds_expected": False}, **left)), "pending", words)
    frozen = facts(gradients=[NONE] * 4, forwards=(), slot={"requires_grad": False}, **left)
    expect(CHECK.judge(frozen), "pending", words)


def test_gradients_that_are_there_pass() -> None:
    expect(CHECK.judge(facts()), "pass")


@pytest.mark.parametrize("moment", ["exception", "step"])
def test_reentrant_checkpoint_is_told_in_every_verdict(moment: str) -> None:
    inside = {**IN_GRAPH, "with_grad": frozenset()}
    if moment == "exception":
        verdict = CHECK.judge(facts(gradients=[NONE] * 4, history=NEVER, forward=inside, moment="exception"))
    else:
        lost = {2: {"missing": 4, "had_gradient": False}, 3: {"missing": 4, "had_gradient": False}}
        verdict = CHECK.judge(facts(gradients=[GRADIENT, GRADIENT, NONE, NONE], at=lost, forward=inside))
    assert verdict.status == "fail"
    assert "pass use_reentrant=False" in verdict.fix
