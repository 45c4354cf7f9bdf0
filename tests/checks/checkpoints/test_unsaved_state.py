from __future__ import annotations

from typing import Any

import pytest
from support.facts import bad, expect, facts, saved

from lora_probe_callbacks.checks.checkpoints.unsaved_state import CHECK, judge

MOVED = (("bn.running_mean", 0.2), ("bn.running_var", 0.5))


def test_state_that_moves_warns() -> None:
    what = facts(unsaved=MOVED)
    expect(
        judge(what),
        "warn",
        "training moves 2 tensors that no optimizer holds, moved by up to 50%: bn.running_var, bn.running_mean: ",
        "the file of the adapter will not hold it",
        cause="base",
        got="2 frozen tensors that changed without an optimizer",
        expected="a base that stays as it is, or modules_to_save that name what changes",
        fix="keep these modules in eval mode",
    )
    assert list(bad(what)) == ["LP808"]


@pytest.mark.parametrize(
    ("of", "status"),
    [
        ({"asked": True}, "fail"),
        ({"asked": True, "beside": "norms.pt"}, "warn"),
        ({}, "warn"),
        ({"unsaved": ()}, "pass"),
        ({"form": "state"}, "pass"),
        ({"unreadable": "cut short"}, "pass"),
        ({"why_not": "no file"}, "pass"),
    ],
)
def test_file_that_leaves_it_out(of: dict[str, Any], status: str) -> None:
    verdict = judge(facts(saves=(saved(**{"unsaved": MOVED, **of}),)))
    assert verdict.status == status
    if status in ("warn", "fail"):
        assert verdict.seen == (3, 30)
        assert "out/adapter.safetensors leaves out 2 tensors" in verdict.message
        assert ("norms.pt" in verdict.fix) is ("beside" in of)


def test_what_was_zero_is_said() -> None:
    assert "moved from zero: bn.mean" in judge(facts(unsaved=(("bn.mean", float("inf")),))).message


def test_whole_checkpoints_hold_it() -> None:
    assert judge(facts(unsaved=MOVED, saves_whole=True)).status == "pass"
    assert judge(facts()).status == "pass"
    assert CHECK.judge(facts(moment="start", ever_stepped=False)).status == "pending"
