"""What the checks on saved files share: which of several files has the say."""

from __future__ import annotations

from support.facts import expect, facts, saved

from lora_probe_callbacks.checks._base import Verdict, fail, ok, skipped, warn
from lora_probe_callbacks.checks.checkpoints._saves import each_save
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
