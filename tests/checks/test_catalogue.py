"""The catalogue as a whole."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from support.facts import bad, facts

from lora_probe_callbacks import checks
from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, some, warn
from lora_probe_callbacks.checks._catalogue import all_checks, explain, selected

CHECKS = all_checks()
FILES = {
    path.stem: module.CHECK
    for path in Path(checks.__path__[0]).glob("*/*.py")
    if isinstance(
        getattr(module := importlib.import_module(f"{checks.__name__}.{path.parent.name}.{path.stem}"), "CHECK", None),
        Check,
    )
}


def test_every_file_with_a_check_is_found_in_the_order_of_the_codes() -> None:
    assert sorted(FILES.values(), key=lambda check: check.code) == list(CHECKS)
    assert len({check.code for check in CHECKS}) == len({check.name for check in CHECKS}) == len(CHECKS)


TESTS = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("*.py"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.code)
def test_every_check_is_expected_by_name_in_some_test(check: Check) -> None:
    assert check.code in TESTS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.code)
def test_text_and_order_of_a_check(check: Check) -> None:
    assert all([check.what, check.why, check.fix, check.quiet, check.name, check.family])
    assert check.name == check.name.lower().replace(" ", "-")
    assert set(check.explained_by) <= {other.code for other in CHECKS} - {check.code}


def test_nearer_causes_are_never_in_a_circle() -> None:
    nearer = {check.code: set(check.explained_by) for check in CHECKS}
    for _ in CHECKS:
        nearer = {code: causes.union(*(nearer[cause] for cause in causes)) for code, causes in nearer.items()}
    assert not [code for code, causes in nearer.items() if code in causes]


def test_healthy_facts_are_quiet() -> None:
    assert not bad(facts())


def test_selected() -> None:
    assert selected() == CHECKS
    assert [c.code for c in selected(["LP101", "LP50"])][:2] == ["LP101", "LP501"]
    assert {c.code for c in selected(None, ["LP101"])} == {c.code for c in CHECKS} - {"LP101"}
    assert selected(["LP1"], ["LP1"]) == ()
    for wrong in ("", "L", "101", "LP999", "lp101"):
        with pytest.raises(ValueError, match=f"select got {wrong!r}, expected a code or a prefix"):
            selected([wrong])
        with pytest.raises(ValueError, match="ignore got"):
            selected(None, [wrong])
    with pytest.raises(ValueError, match=r"select got the string 'LP1', expected a sequence: \['LP1'\]"):
        selected("LP1")
    with pytest.raises(ValueError, match="ignore got the string"):
        selected(None, "LP1")


def of(*slots: int, cause: str = "") -> Verdict:
    return fail("broken", slots, got="1", expected="0", cause=cause)


def test_consequences_are_left_out() -> None:
    """LP302 is explained by LP101 and by LP102, among others."""
    verdicts = {"LP101": of(0), "LP102": of(1), "LP302": of(0, 1), "LP206": Verdict("pass")}
    kept = explain(verdicts)
    assert kept["LP302"] == Verdict("skipped", "explained by LP101, LP102")
    assert kept["LP101"] is verdicts["LP101"]
    assert kept["LP206"] is verdicts["LP206"]
    assert verdicts["LP302"].status == "fail", "the argument is not changed"


def test_what_is_explained_in_part_is_kept() -> None:
    verdicts = {"LP101": of(0), "LP302": of(0, 1)}
    assert explain(verdicts)["LP302"] is verdicts["LP302"]


def test_warnings_explain_and_are_explained() -> None:
    odd = warn("odd", [0], got="1", expected="0", fix="look")
    assert explain({"LP101": odd, "LP302": odd})["LP302"].status == "skipped"


def test_passed_and_pending_checks_explain_nothing() -> None:
    for status in ("pass", "pending", "skipped"):
        verdicts = {"LP101": Verdict(status, slots=frozenset([0])), "LP302": of(0)}
        assert explain(verdicts)["LP302"].status == "fail"


def test_other_adapters_are_told_apart_by_their_causes() -> None:
    assert explain({"LP207": of(cause="a"), "LP404": of(cause="a")})["LP404"].status == "skipped"
    assert explain({"LP207": of(cause="a"), "LP404": of(cause="b")})["LP404"].status == "fail"
    assert explain({"LP207": of(), "LP404": of()})["LP404"].status == "fail"
    assert explain({"LP207": of(cause="a"), "LP404": of(1, cause="a")})["LP404"].status == "fail"


def test_some() -> None:
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert some(["a", "b"], 1) == "a and 1 more"
    assert some([]) == ""


def test_four_steps_are_persistent() -> None:
    assert PERSISTENT == 4


def test_verdict_of_no_slot_is_not_explained_by_slots() -> None:
    assert explain({"LP207": of(1, cause="a"), "LP404": of(cause="b")})["LP404"].status == "fail"
