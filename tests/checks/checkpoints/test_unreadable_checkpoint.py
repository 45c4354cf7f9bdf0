from __future__ import annotations

from support.facts import bad, expect, facts, saved

from lora_probe_callbacks.checks.checkpoints.unreadable_checkpoint import CHECK, judge

SEEN = (3, 30)
CUT = {"unreadable": "cut short"}


def test_damaged_file_fails_when_nobody_writes_any_more() -> None:
    what = facts(saves=(saved(**CUT, final=True),))
    expect(
        judge(what),
        "fail",
        "out/adapter.safetensors cannot be read: cut short",
        got="cut short",
        expected="a complete file",
        fix="look at the free space of the disk and write the file again",
        seen=SEEN,
    )
    assert "check_saved" not in judge(what).fix
    assert list(bad(what)) == ["LP807"]


def test_damaged_file_warns_while_training_goes_on() -> None:
    expect(
        judge(facts(saves=(saved(**CUT),))),
        "warn",
        "out/adapter.safetensors cannot be read: cut short",
        got="cut short",
        expected="a complete file",
        fix="write the file again; if it is still being written, check_saved(path) tells later",
        seen=SEEN,
    )


def test_damaged_file_is_found_beside_others() -> None:
    saves = (saved(), saved(why_not="deleted"), saved(path="second", step=7, framework_step=14, **CUT))
    verdict = judge(facts(saves=saves))
    assert (verdict.status, verdict.seen) == ("warn", (7, 14))
    assert "second" in verdict.message


def test_complete_file_passes() -> None:
    expect(judge(facts(saves=(saved(),))), "pass")
    expect(judge(facts(saves=(saved(why_not="deleted"), saved()))), "pass")


def test_nothing_saved_is_pending() -> None:
    expect(CHECK.judge(facts()), "pending", "nothing was saved yet")


def test_file_that_was_not_compared_is_skipped_with_its_reason() -> None:
    saves = (saved(why_not="deleted meanwhile"), saved(why_not="older than the last step"))
    expect(judge(facts(saves=saves)), "skipped", "out/adapter.safetensors: deleted meanwhile")


def test_changed_values_are_left_to_their_own_check() -> None:
    assert list(bad(facts(saves=(saved(values="not finite"),)))) == ["LP801"]
