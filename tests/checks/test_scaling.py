from __future__ import annotations

import dataclasses

import pytest
from facts import ZERO, bad, facts

from lora_probe_callbacks.checks.scaling import judge


@pytest.mark.parametrize(
    ("got", "natural", "status"),
    [
        (2.0, 2.0, "pass"),
        (2.0 * (1 + 1e-8), 2.0, "pass"),
        (2.0 * (1 + 1e-5), 2.0, "warn"),
        (0.0, 2.0, "fail"),
        (0.0, 0.0, "fail"),
        (-2.0, 2.0, "warn"),
        (None, None, "skipped"),
        (1.0, None, "pass"),
    ],
)
def test_scaling(got: float | None, natural: float | None, status: str) -> None:
    assert judge(facts(unit={"scaling": got, "natural": natural})).status == status


def test_zero_scaling_explains_zero_gradients() -> None:
    what = facts(unit={"scaling": 0.0, "natural": 2.0}, gradients=[ZERO] * 4, history={"zero": 4, "had_signal": False})
    assert list(bad(what)) == ["LP502"]


def test_zero_scaling_of_a_part_warns() -> None:
    what = facts(unit={"scaling": 2.0, "natural": 2.0})
    units = (dataclasses.replace(what.units[0], scaling=0.0), what.units[1])
    verdict = judge(dataclasses.replace(what, units=units))
    assert (verdict.status, verdict.slots) == ("warn", {0, 1})
