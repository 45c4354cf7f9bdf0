from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.facts import expect, facts

from lora_probe_callbacks.checks.activation.rows_without_adapter import CHECK
from lora_probe_callbacks.checks.reachability.zero_gradient import CHECK as ZERO
from lora_probe_callbacks.facts import Facts


def ran(rows: tuple[tuple[str, int, int], ...], without_token: int, **more: Any) -> Facts:
    what = facts(**more)
    (forward,) = what.forwards
    return dataclasses.replace(what, forwards=(dataclasses.replace(forward, rows=rows, without_token=without_token),))


def test_row_without_invocation_tokens_warns() -> None:
    expect(
        CHECK.judge(ran((("default", 1, 4),), 3)),
        "warn",
        "missing in 3 of 4 rows",
        got="invocation tokens in 1 of 4 rows",
        expected="in every row that should train",
        fix="compare alora_invocation_tokens",
    )


@pytest.mark.parametrize(("row", "status"), [(3, "warn"), (4, "fail")])
def test_no_row_at_all_fails_once_the_gradients_are_zero_for_long(row: int, status: str) -> None:
    what = ran((("default", 0, 4),), 4, history={"zero": row, "had_signal": False})
    assert CHECK.judge(what).status == status
    assert CHECK.code in ZERO.explained_by


def test_rows_that_name_their_adapters_pass() -> None:
    assert CHECK.judge(ran((("default", 2, 4), ("b", 1, 4)), 0)).status == "pass"


def test_batches_that_switch_nothing_do_not_apply() -> None:
    verdict = CHECK.judge(facts())
    assert verdict.status == "pending"
    assert verdict.nothing_new
