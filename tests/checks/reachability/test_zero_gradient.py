from __future__ import annotations

import pytest
from support.facts import ALL, GRADIENT, NONE, ZERO, bad, expect, facts, unread

from lora_probe_callbacks.checks.reachability.zero_gradient import CHECK

NEVER = {"zero": 4, "had_signal": False}
A_IS_ZERO = {0: {"zero": 1, "had_signal": False}, 2: {"zero": 1, "had_signal": False}}


@pytest.mark.parametrize("zero", [3, 4])
def test_every_gradient_zero_since_the_start_fails_after_four_steps(zero: int) -> None:
    what = facts(gradients=[ZERO] * 4, history={**NEVER, "zero": zero})
    if zero < 4:
        words = "every gradient is exactly zero in 3 probed step(s): a batch without a signal is healthy"
        expect(CHECK.judge(what), "pending", words)
        return
    assert list(bad(what)) == ["LP303"]
    words = "every adapter gradient is exactly zero since the first step, 4 probed steps now"
    got = "4 gradients, each exactly 0, in 4 probed steps in a row"
    expect(CHECK.judge(what), "fail", words, slots=ALL, got=got, expected="a gradient")


def test_after_a_signal_it_warns() -> None:
    verdict = CHECK.judge(facts(gradients=[ZERO] * 4, history={"zero": 4}))
    expect(
        verdict,
        "warn",
        "every adapter gradient is exactly zero in 4 probed steps in a row",
        slots=ALL,
        got="4 gradients, each exactly 0, in 4 probed steps in a row",
        expected="a gradient",
        fix="if the batches carried no signal (equal rewards, masked labels) nothing is wrong",
    )


def test_zero_gradients_of_a_at_the_first_step_are_healthy() -> None:
    expect(CHECK.judge(facts(gradients=[ZERO, GRADIENT] * 2, at=A_IS_ZERO)), "pass")


def test_a_alone_is_judged_where_there_is_no_b() -> None:
    what = facts(gradients=[ZERO] * 4, slot={"role": "A"}, history=NEVER)
    assert CHECK.judge(what).status == "fail"


def test_shortest_row_decides() -> None:
    what = facts(gradients=[ZERO] * 4, history=NEVER, at={3: {"zero": 3}})
    assert (CHECK.judge(what).status, "in 3 probed" in CHECK.judge(what).message) == ("pending", True)


def test_part_at_zero_is_pending() -> None:
    what = facts(gradients=[GRADIENT, GRADIENT, ZERO, ZERO], at={2: {"zero": 9}, 3: {"zero": 9}})
    expect(CHECK.judge(what), "pending", "1 gradients are exactly zero so far: layer.1.lora_B")


@pytest.mark.parametrize(
    ("zero", "since", "step", "status"),
    [(16, 20, 36, "warn"), (15, 20, 120, "pending"), (16, 20, 119, "warn")],
)
def test_part_at_zero_for_long_warns(zero: int, since: int, step: int, status: str) -> None:
    lost = {"zero": zero, "zero_since": since}
    verdict = CHECK.judge(facts(gradients=[GRADIENT, GRADIENT, GRADIENT, ZERO], at={3: lost}, step=step))
    assert verdict.status == status
    if status == "warn":
        expect(
            verdict,
            "warn",
            "the gradients of 1 adapter tensors are exactly zero in every probed step since step 20: layer.1.lora_B",
            slots=[3],
            got="exactly 0",
            expected="a gradient, unless no input reaches them",
            fix="if their inputs were absent so far (an expert, a modality, a token) nothing is wrong",
        )


def test_a_that_never_gets_a_gradient_warns_as_well() -> None:
    """B learns, and A stands still: no dropout, no mask does that for sixteen probed steps."""
    lost = {"zero": 20, "zero_since": 0}
    verdict = CHECK.judge(facts(gradients=[ZERO, GRADIENT] * 2, at={0: lost, 2: {**lost, "zero_since": 5}}, step=120))
    assert (verdict.status, verdict.slots) == ("warn", {0, 2})
    assert "since step 5: layer.0.lora_A, layer.1.lora_A" in verdict.message
    short = {"zero": 15, "zero_since": 0}
    assert CHECK.judge(facts(gradients=[ZERO, GRADIENT] * 2, at={0: short}, step=99)).status == "pass"


@pytest.mark.parametrize(("since", "status"), [(20, "warn"), (21, "pass")])
def test_rows_of_rare_tokens_are_waited_for_a_hundred_steps(since: int, status: str) -> None:
    own = {"zero": 16, "zero_since": since, "part": "trainable_tokens_delta", "role": "other"}
    verdict = CHECK.judge(facts(gradients=[GRADIENT, GRADIENT, GRADIENT, ZERO], at={3: own}, step=120))
    assert verdict.status == ("pending" if status == "pass" else "warn")


def test_only_what_is_at_zero_for_long_is_named() -> None:
    at = {1: {"zero": 20, "zero_since": 0}, 3: {"zero": 2, "zero_since": 118}}
    gradients = [GRADIENT, ZERO, GRADIENT, ZERO, GRADIENT, GRADIENT]
    assert CHECK.judge(facts(units=3, gradients=gradients, at=at, step=120)).slots == {1}


def test_nothing_was_read() -> None:
    expect(CHECK.judge(unread(facts())), "pending", "no gradient was read at this decision")


def test_missing_gradients_are_left_to_the_neighbours() -> None:
    expect(CHECK.judge(facts(gradients=[NONE] * 4)), "pending", "no gradient was read at this decision")
    what = facts(gradients=[NONE, NONE, ZERO, ZERO], history=NEVER, at={1: {"zero": 0}})
    assert (CHECK.judge(what).status, CHECK.judge(what).slots) == ("fail", {2, 3})


def test_frozen_by_intent_passes() -> None:
    assert CHECK.judge(facts(gradients=[ZERO] * 4, history=NEVER, slot={"frozen_by_intent": True})).status == "pending"


def test_one_tensor_that_had_a_signal_softens_the_verdict() -> None:
    what = facts(gradients=[ZERO] * 4, history=NEVER, at={3: {"had_signal": True}})
    assert CHECK.judge(what).status == "warn"
    of_a = facts(gradients=[ZERO] * 4, history=NEVER, at={2: {"had_signal": True}})
    assert CHECK.judge(of_a).status == "fail"


def test_healthy_gradients_pass() -> None:
    expect(CHECK.judge(facts()), "pass")


def test_first_step_with_gradients_of_zero_is_pending() -> None:
    verdict = CHECK.judge(facts(gradients=[ZERO] * 4, history={**NEVER, "zero": 1}))
    expect(
        verdict, "pending", "every gradient is exactly zero in 1 probed step(s): a batch without a signal is healthy"
    )
