from __future__ import annotations

import dataclasses

import pytest
from support.facts import ALL, ZERO, bad, expect, facts

from lora_probe_callbacks.checks.values.scaling import CHECK, judge
from lora_probe_callbacks.facts import Facts


def scaled(*units: tuple[float | None, float | None]) -> Facts:
    """Factor, and what rank and alpha say, of each unit."""
    what = facts(units=len(units))
    changed = tuple(
        dataclasses.replace(unit, scaling=got, natural=natural)
        for unit, (got, natural) in zip(what.units, units, strict=True)
    )
    return dataclasses.replace(what, units=changed)


@pytest.mark.parametrize(
    ("got", "natural", "status"),
    [
        (2.0, 2.0, "pass"),
        (2.0 * (1 + 1e-8), 2.0, "pass"),
        (2.0 * (1 + 1e-5), 2.0, "warn"),
        (2.0, 2.0 * (1 + 1e-5), "warn"),
        (1e6, 1e6 + 0.9, "pass"),  # relative to the larger of the two
        (1e6, 1e6 + 1.1, "warn"),
        (1e-3, 1e-3 * (1 + 1e-5), "warn"),
        (0.0, 2.0, "fail"),
        (0.0, 0.0, "fail"),
        (-2.0, 2.0, "warn"),
        (2.0, -2.0, "warn"),
        (None, None, "skipped"),
        (1.0, None, "pass"),
        (2.0, 0.0, "warn"),
        (1.0 + 0.9e-6, 1.0, "pass"),
        (1.0 + 1.1e-6, 1.0, "warn"),
    ],
)
def test_scaling(got: float | None, natural: float | None, status: str) -> None:
    assert judge(facts(unit={"scaling": got, "natural": natural})).status == status


def test_factor_of_zero_fails() -> None:
    expect(
        judge(scaled((0.0, 2.0), (0.0, 4.0), (None, 8.0))),
        "fail",
        "the scaling of all 2 adapted layers is 0: the adapter adds nothing and gets no gradient",
        slots=ALL,
        cause="zero",
        got="scaling 0",
        expected="scaling 2 or 4",
    )


def test_alpha_of_zero_is_said_in_words() -> None:
    assert judge(scaled((0.0, 0.0))).evidence["expected"] == "alpha/r with an alpha above 0"
    assert judge(scaled((0.0, None))).evidence["expected"] == "alpha/r with an alpha above 0"
    assert judge(scaled((0.0, 0.0), (0.0, 2.0))).evidence["expected"] == "scaling 2"


def test_zero_scaling_of_a_part_warns() -> None:
    expect(
        judge(scaled((2.0, 2.0), (0.0, 2.0), (3.0, 2.0))),
        "warn",
        "the scaling of 1 of 3 adapted layers is 0: layer.1",
        slots=[2, 3],
        cause="zero",
        got="scaling 0",
        expected="scaling 2",
        fix="if these layers are switched off on purpose nothing is wrong",
    )


def test_other_scaling_warns() -> None:
    expect(
        judge(scaled((2.0, 2.0), (1.0, 2.0), (0.5, 4.0))),
        "warn",
        "the scaling of 2 of 3 adapted layers is 1, not 2 as their rank and alpha say: layer.1, layer.2",
        slots=[2, 3, 4, 5],
        cause="other",
        got="scaling 1",
        expected="scaling 2 or 4",
        fix="else call unscale_layer() after every scale_layer()",
    )


def test_tuners_without_a_factor_are_skipped() -> None:
    expect(CHECK.judge(facts()), "skipped", "no expected layer has a factor alpha/r")
    expect(judge(scaled((None, None), (2.0, 2.0))), "pass")


def test_zero_scaling_explains_zero_gradients() -> None:
    what = facts(unit={"scaling": 0.0, "natural": 2.0}, gradients=[ZERO] * 4, history={"zero": 4, "had_signal": False})
    assert list(bad(what)) == ["LP502"]
