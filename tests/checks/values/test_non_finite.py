from __future__ import annotations

import dataclasses

import pytest
from support.facts import GRADIENT, INFINITE, MOVED, bad, expect, facts, unread

from lora_probe_callbacks.checks.values.non_finite import CHECK

BROKEN = MOVED._replace(norm=float("nan"))
SECOND = [GRADIENT, INFINITE, GRADIENT, GRADIENT]


def test_tensors_that_hold_inf_fail() -> None:
    what = facts(updates=[MOVED, BROKEN, None, BROKEN])
    assert list(bad(what)) == ["LP501"]
    expect(
        CHECK.judge(what),
        "fail",
        "2 adapter tensors hold inf or nan after the step: layer.0.lora_B, layer.1.lora_B",
        slots=[1, 3],
        got="2 tensors not finite",
        expected="0",
        of_update=True,
    )


def test_gradients_about_to_be_applied_fail() -> None:
    expect(
        CHECK.judge(facts(gradients=SECOND)),
        "fail",
        "1 adapter gradients are inf or nan and are about to be applied: layer.0.lora_B",
        slots=[1],
        got="1 gradients not finite",
        expected="0",
    )


def test_gradients_that_may_still_change_are_pending() -> None:
    words = "1 gradients are not finite (layer.0.lora_B); "
    verdict = CHECK.judge(facts(gradients=SECOND, gradients_final=False))
    expect(verdict, "pending", words + "the update will tell whether they were applied")
    scaled = CHECK.judge(facts(gradients=SECOND, scaler=True))
    expect(scaled, "pending", words + "the gradient scaler skips such a step")


@pytest.mark.parametrize("update", [True, False])
def test_nothing_was_read(update: bool) -> None:
    what = unread(facts())
    if update:
        expect(CHECK.judge(what), "pass")
        return
    expect(
        CHECK.judge(dataclasses.replace(what, update=None)),
        "pending",
        "no gradient was read at this decision",
    )
    expect(CHECK.judge(facts(update=None)), "pass")


def test_finite_values_pass() -> None:
    expect(CHECK.judge(facts()), "pass")


def test_overflow_again_and_again_is_left_to_skipped_steps() -> None:
    what = facts(gradients=[INFINITE] * 4, scaler=True, loss_scale=1.0, skipped_in_a_row=4)
    assert list(bad(what)) == ["LP406"]
