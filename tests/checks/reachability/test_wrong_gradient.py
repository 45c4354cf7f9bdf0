from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, bad, expect, facts

from lora_probe_callbacks.checks.reachability.wrong_gradient import CHECK, hopeless, unsettled
from lora_probe_callbacks.facts import Facts, StepResponse

WRONG = {"central": 0.5, "again": 0.52, "own": 0.5, "sides": (0.48, 0.52), "sixteen": True}
PRECISE = {"central": 0.5, "near": 0.5, "own": 0.5, "sides": (0.5, 0.5)}


def response(step: int = 3, **changes: Any) -> StepResponse:
    return StepResponse(step, 10 * step, **{"predicted": -1.0, "measured": -1.0, "central": 1.0, **changes})


def steps(*changes: dict[str, Any]) -> Facts:
    return facts(responses=tuple(response(step, **c) for step, c in enumerate(changes)))


def test_gradient_that_disagrees_in_two_steps_fails() -> None:
    what = steps(WRONG, {}, {**WRONG, "central": 0.6, "again": 0.62, "own": 0.6})
    assert list(bad(what)) == ["LP307"]
    expect(
        CHECK.judge(what),
        "fail",
        "the gradient is not that of the loss",
        slots=ALL,
        got="finite difference over gradient 0.50, 0.60 in steps 0, 2",
        expected="1, within rounding",
        seen=(2, 20),
    )


def test_one_bad_step_is_not_enough() -> None:
    words = "the gradient disagrees with a finite difference in one step (0.50)"
    expect(CHECK.judge(steps({}, WRONG)), "pending", words)
    expect(CHECK.judge(steps(WRONG, {})), "pass")


@pytest.mark.parametrize(("central", "status"), [(0.851, "pass"), (0.849, "fail"), (1.149, "pass"), (1.151, "fail")])
def test_fifteen_per_cent_are_allowed_in_sixteen_bits(central: float, status: str) -> None:
    bad_step = {**WRONG, "central": central, "again": central, "own": central, "sides": (central, central)}
    assert CHECK.judge(steps(bad_step, bad_step)).status == status


@pytest.mark.parametrize(("central", "status"), [(0.981, "pass"), (0.979, "fail"), (1.019, "pass"), (1.021, "fail")])
def test_two_per_cent_are_allowed_in_full_precision(central: float, status: str) -> None:
    bad_step = {"central": central, "near": central, "own": central, "sides": (central, central)}
    assert CHECK.judge(steps(bad_step, bad_step)).status == status


@pytest.mark.parametrize(
    ("central", "near", "status"),
    [
        (0.85, 0.99, "pass"),  # curved, and nearer by it is right
        (0.80, 0.82, "fail"),
        (0.80, 0.91, "skipped"),  # curved by so much that nothing is certain
        (0.93, 0.945, "fail"),
        (0.93, 0.965, "skipped"),
    ],
)
def test_curvature_is_taken_out(central: float, near: float, status: str) -> None:
    bad_step = {**PRECISE, "central": central, "near": near, "sides": (central, central)}
    assert CHECK.judge(steps(bad_step, bad_step)).status == status


def test_only_looks_at_the_same_tensors_count_together() -> None:
    some, others = {**PRECISE, "slots": (0, 1)}, {**PRECISE, "slots": (2,)}
    assert CHECK.judge(steps(some, others)).status == "pending"
    verdict = CHECK.judge(steps(some, others, {**PRECISE, "slots": (2,)}))
    assert (verdict.status, verdict.slots) == ("fail", {2})
    assert "along that of layer.1.lora_A" in verdict.message


def test_gradient_of_exactly_zero() -> None:
    stray = {"central": None, "stray": 0.03, "near": 0.03, "slots": (1,)}
    assert CHECK.judge(steps(stray)).status == "pending"
    expect(
        CHECK.judge(steps(stray, stray)),
        "fail",
        "the gradient of 1 adapter tensors is exactly zero, and the loss changes where they are moved: layer.0.lora_B",
        slots={1},
        got="a change of 3.0% of that along the whole gradient in steps 0, 1",
        expected="none",
        cause="zero",
        fix="fused losses",
        seen=(1, 10),
    )
    for healthy in ({"stray": 0.001}, {"near": 0.01}, {"noise": 0.01}):
        assert CHECK.judge(steps(stray | healthy, stray | healthy)).status in ("pass", "skipped")


def test_loss_outside_the_model() -> None:
    off = {"outside": -0.5, "outside_noise": 0.01}
    assert CHECK.judge(steps(off, {})).status == "pass"
    expect(
        CHECK.judge(steps(off, off)),
        "fail",
        "the loss is made outside the model, and its backward is wrong",
        slots=ALL,
        got="off by 0.50, 0.50 of a random move's change, in steps 0, 1",
        expected="0, within rounding",
        cause="loss",
        fix="fused losses",
        seen=(1, 10),
    )
    for healthy in ({"outside": 0.09}, {"outside_noise": 0.2}, {"outside": None}):
        assert CHECK.judge(steps(off | healthy, off | healthy)).status == "pass"


DISAGREE = "finite differences of two sizes disagree"
RIGHT = "made anew from the outputs alone and a little aside, the gradient is right"
KINK = "no gradient fits both"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"again": 0.56}, DISAGREE),
        ({"again": 0.44}, DISAGREE),
        ({"noise": 0.13}, "too small to be told from rounding"),
        ({"again": float("nan")}, DISAGREE),
        ({"own": 0.86}, RIGHT),
        # Nothing is left of the gradient's share so far out: they agree by being small.
        ({"own": 0.12, "again": 0.03}, DISAGREE),
        ({"own": 0.09, "again": 0.09}, DISAGREE),
        ({"sides": (0.3, 0.56)}, KINK),
        ({"sides": (0.56, 0.3)}, KINK),
        ({"sides": (0.8, 0.9)}, KINK),
        ({"sides": (0.9, 0.8)}, KINK),
    ],
)
def test_doubtful_steps_are_skipped(changes: dict[str, Any], words: str) -> None:
    expect(CHECK.judge(steps(WRONG, WRONG | changes)), "skipped", words)
    assert CHECK.judge(steps(WRONG | changes, WRONG)).status == "pending", "it does not count"


@pytest.mark.parametrize(
    "changes",
    [
        {"again": 0.54},
        {"again": 0.46},
        {"noise": 0.12},
        {"own": 0.84, "again": 0.8},
        {"own": 0.11, "again": 0.11},
        {"sides": (0.25, 0.5)},
    ],
)
def test_small_differences_are_no_doubt(changes: dict[str, Any]) -> None:
    assert CHECK.judge(steps(WRONG, WRONG | changes)).status == "fail"


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, False),
        ({"central": None}, False),
        ({"central": float("nan")}, False),
        ({"why_not": "two forwards"}, False),
        ({"central": 0.5, "sides": (0.1, 0.9)}, False),
        ({"central": 0.5, "sides": (0.5, 0.5), "noise": 0.2}, False),
        ({"central": 0.5, "sides": (0.5, 0.5)}, True),
        ({"central": 0.5, "sides": (0.5, 0.5), "own": 1.0}, False),
        ({"central": 0.5, "sides": (0.5, 0.5), "own": 0.5}, True),
        ({"central": 0.5, "sides": (0.5, 0.5), "own": 0.5, "again": 0.7}, False),
        ({"central": 0.5, "sides": (0.5, 0.5), "own": 0.5, "again": 0.5}, True),
    ],
)
def test_more_is_measured_as_long_as_nothing_settles_it(changes: dict[str, Any], more: bool) -> None:
    assert unsettled(response(**changes)) is more


SKIPPED = {"why_not": "the forward raised OutOfMemoryError: 1 GiB"}


@pytest.mark.parametrize(
    ("changes", "up"),
    [
        ([SKIPPED] * 4, True),
        ([{"why_not": f"the forward raised OutOfMemoryError: {n} GiB"} for n in range(4)], True),
        ([{"why_not": f"the forward raised RuntimeError: shape {n}: of this batch"} for n in range(4)], True),
        ([WRONG | {"own": 1.0}] * 4, False),  # another part may be told
        ([SKIPPED] * 3, False),
        ([{}, *[SKIPPED] * 4], True),
        ([{}, *[SKIPPED] * 3], False),
        ([SKIPPED, SKIPPED, SKIPPED, {}], False),
        ([SKIPPED, SKIPPED, SKIPPED, WRONG], False),  # what is found is followed
        ([SKIPPED, SKIPPED, SKIPPED, WRONG | {"own": 1.0}], False),
        ([SKIPPED | {"passing": True}] * 4, False),
        ([SKIPPED] * 3 + [SKIPPED | {"passing": True}], False),
    ],
)
def test_four_steps_that_cannot_be_judged_for_one_reason_are_the_last(changes: list[dict[str, Any]], up: bool) -> None:
    what = steps(*changes)
    assert hopeless(what.responses) is up
    assert ("4 steps in a row: not tried again in this run" in CHECK.judge(what).message) is up


def test_reasons_not_to_judge() -> None:
    expect(CHECK.judge(facts()), "pending", "no gradient was measured yet")
    expect(CHECK.judge(steps(WRONG, WRONG, {"why_not": "two forwards"})), "skipped", "two forwards")
    for nothing in (None, float("nan")):
        verdict = CHECK.judge(steps(WRONG, WRONG, {"central": nothing}))
        expect(verdict, "skipped", "the gradient says that nothing changes along it")
    assert CHECK.judge(steps({"central": None, "why_not": "x"}, WRONG, WRONG)).status == "fail"


def test_right_gradient_passes() -> None:
    expect(CHECK.judge(steps({}, {"central": 0.99})), "pass")


def test_stale_forward_is_the_nearer_cause() -> None:
    what = facts(responses=(response(2, **WRONG), response(3, **WRONG)), stale_forward=(True, "differ"))
    assert list(bad(what)) == ["LP405"]


def test_two_sizes_agree_relative_to_the_first_below_one_and_absolutely_above() -> None:
    large = {"sixteen": True, "central": 1.5, "again": 1.36, "own": 1.5, "sides": (1.5, 1.5)}
    expect(CHECK.judge(steps(large, large)), "skipped", DISAGREE)
    assert CHECK.judge(steps({**large, "again": 1.41}, {**large, "again": 1.41})).status == "fail"


def test_difference_of_exactly_what_rounding_may_make_is_in_doubt() -> None:
    of_noise = {"sixteen": True, "central": 0.5, "again": 0.5, "own": 0.5, "sides": (0.5, 0.5), "noise": 0.125}
    expect(CHECK.judge(steps(of_noise, of_noise)), "skipped", "too small to be told from rounding")
