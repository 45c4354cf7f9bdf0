"""What the checks on saved files share: which of several files has the say, and whose values are in it."""

from __future__ import annotations

from typing import Any

import pytest
from support.facts import expect, facts, saved

from lora_probe_callbacks.checks._base import Verdict, fail, ok, skipped, warn
from lora_probe_callbacks.checks.checkpoints._saves import Values, each_save, values_of
from lora_probe_callbacks.facts import SavedFact

SEEN = (3, 30)


def by_path(save: SavedFact) -> Verdict | None:
    words = {"got": "1", "expected": "0"}
    kinds = {"bad": fail("bad", **words), "odd": warn("odd", fix="look", **words), "good": ok(), "unlike": None}
    return kinds.get(save.path, skipped("no"))


def test_nothing_saved_is_pending() -> None:
    expect(each_save(facts(), by_path), "pending", "nothing was saved yet")


def test_worst_file_has_the_say() -> None:
    saves = tuple(saved(path=path, step=i) for i, path in enumerate(("good", "unlike", "odd", "bad", "none")))
    verdict = each_save(facts(saves=saves), by_path)
    assert (verdict.status, verdict.message, verdict.seen) == ("fail", "bad", (3, 30))
    assert each_save(facts(saves=saves[:3]), by_path).status == "warn"
    assert each_save(facts(saves=(saves[4], saves[0])), by_path).status == "pass"


def test_verdict_tells_the_step_of_its_own_file() -> None:
    saves = (saved(path="good"), saved(path="bad", step=7, framework_step=14))
    assert each_save(facts(saves=saves), by_path).seen == (7, 14)


def test_file_without_this_kind_is_skipped() -> None:
    verdict = each_save(facts(saves=(saved(path="unlike"),)), by_path)
    expect(verdict, "skipped", "unlike: nothing of this kind is in it", seen=SEEN)


def test_unreadable_file_is_never_judged() -> None:
    verdict = each_save(facts(saves=(saved(path="bad", unreadable="cut short"),)), by_path)
    expect(verdict, "skipped", "bad: it cannot be read: cut short", seen=SEEN)


def test_file_that_was_not_compared_is_never_judged() -> None:
    verdict = each_save(facts(saves=(saved(path="bad", why_not="older than the last step"),)), by_path)
    expect(verdict, "skipped", "bad: older than the last step", seen=SEEN)


# --- whose values these are -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", ["equal", "untrained", "start", "previous", "partly", "unrelated", "fresh", "related", "not finite"]
)
def test_values_are_told_by_their_signs(values: Values) -> None:
    assert values_of(saved(values=values)) == values


@pytest.mark.parametrize(
    ("signs", "values"),
    [
        ({"compared": 0}, None),
        ({"other": "second", "differing": ("a",)}, None),
        ({"zero_b": True, "b_moved": False}, "equal"),
        ({"zero_b": True, "b_moved": True}, "untrained"),
    ],
)
def test_values_that_do_not_differ(signs: dict[str, Any], values: Values | None) -> None:
    assert values_of(saved(**signs)) == values


@pytest.mark.parametrize(
    ("signs", "values"),
    [
        ({"cosine": 0.5}, "related"),
        ({"cosine": 0.499}, "unrelated"),
        ({"cosine": 0.499, "like_start": True}, "start"),
        ({"cosine": 0.6, "like_previous": True}, "previous"),
        ({"live_zero_b": True, "b_moved": True}, "related"),
        ({"live_zero_b": True, "zero_b": True}, "fresh"),
        ({"zero_b": True, "not_finite": 1}, "not finite"),
        ({"zero_b": True, "like_start": True}, "untrained"),
        # A quarter of what has moved is right; without a start, any is.
        ({"moved": 4, "moved_right": 1, "differing": ("a", "b", "c")}, "partly"),
        ({"moved": 5, "moved_right": 1}, "related"),
        ({"moved": 4, "moved_right": 0, "differing": ("a",)}, "related"),
        ({"moved": 0, "differing": ("a", "b", "c")}, "partly"),
    ],
)
def test_values_that_differ(signs: dict[str, Any], values: Values) -> None:
    assert values_of(saved(values="related", **signs)) == values


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("equal", "equal"),
        ("untrained", "untrained"),
        ("partly", "partly"),
        ("unrelated", "unrelated"),
        ("not finite", "not finite"),
        ("start", None),
        ("previous", None),
        ("fresh", None),
        ("related", None),
    ],
)
def test_values_of_an_older_file_are_wrong_only_if_no_time_has_them(values: Values, told: Values | None) -> None:
    assert values_of(saved(values=values, why_no_values="the file is older than the last step")) == told
