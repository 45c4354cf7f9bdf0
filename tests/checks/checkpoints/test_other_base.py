from __future__ import annotations

import math
from typing import Any

import pytest
from support.facts import ALL, bad, expect, facts, resumed

from lora_probe_callbacks.checks.checkpoints.other_base import CHECK, judge


def of(base: float | None, why: str | None = None, **changes: Any) -> Any:
    return judge(facts(restored=resumed(base=base, why_no_base=why), **changes))


@pytest.mark.parametrize(("base", "got"), [(0.123, "relative distance 0.12"), (math.inf, "another shape")])
def test_other_base_fails(base: float, got: str) -> None:
    expect(
        of(base),
        "fail",
        "the base weight of layer.0 is not the one that the adapter in last.ckpt was trained on",
        slots=ALL,
        cause="base",
        got=got,
        expected="at most 0.02",
    )


def test_rounding_passes() -> None:
    expect(of(0.02), "pass")
    assert of(0.0201).status == "fail"


def test_nothing_restored_is_pending() -> None:
    expect(CHECK.judge(facts()), "pending", "no saved state was restored")


def test_base_that_was_not_sampled_is_skipped_with_its_reason() -> None:
    expect(of(None, "quantised in another way"), "skipped", "quantised in another way")
    expect(of(None), "skipped", "no base weight was sampled")


def test_base_that_trains_is_not_judged() -> None:
    expect(of(0.5, trainable_bases=("layer.0",)), "skipped", "the base trains as well")


def test_adapter_of_another_time_is_left_to_its_own_check() -> None:
    assert list(bad(facts(restored=resumed(base=0.5, fresh=True)))) == ["LP803"]
    assert list(bad(facts(restored=resumed(base=0.5)))) == ["LP806"]
