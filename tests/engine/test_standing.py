"""A verdict that stands is the one that the check would give again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.facts import GRADIENT, facts
from support.recipes import RECIPES, Recipe, parameters
from support.training import adamw, batches, lora, next_token_loss, watch

from lora_probe_callbacks import LoraProbeMonitor
from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok
from lora_probe_callbacks.checks._catalogue import all_checks
from lora_probe_callbacks.engine.standing import Standing
from lora_probe_callbacks.facts import Facts

HEALTHY = facts()


class Counted:
    """A check that reads one field, and a second one only where the first is not empty."""

    def __init__(self) -> None:
        self.asked = 0
        self.check = Check("LP999", "counted", "", "", "", "", self.judge)

    def judge(self, facts: Facts) -> Verdict:
        self.asked += 1
        if not facts.nested:
            return ok()
        return fail("", got=str(facts.optimizers), expected="")


def changed(**changes: object) -> Facts:
    return dataclasses.replace(HEALTHY, **changes)


def test_is_not_asked_again_while_nothing_changes_that_it_reads() -> None:
    counted, standing = Counted(), Standing()
    first = standing.judge(counted.check, HEALTHY)
    for step in range(3):
        assert standing.judge(counted.check, changed(step=100 + step, optimizers=step)) is first
    assert counted.asked == 1


def test_is_asked_again_when_what_it_reads_has_changed() -> None:
    counted, standing = Counted(), Standing()
    assert standing.judge(counted.check, HEALTHY).status == "pass"
    assert standing.judge(counted.check, changed(nested=("layer",), optimizers=2)).evidence["got"] == "2"
    assert standing.judge(counted.check, HEALTHY).status == "pass"


def test_what_is_read_on_one_path_alone_counts_on_that_path() -> None:
    counted, standing = Counted(), Standing()
    for _ in range(2):
        standing.judge(counted.check, changed(nested=("layer",), optimizers=1))
    assert counted.asked == 1
    assert standing.judge(counted.check, changed(nested=("layer",), optimizers=3)).evidence["got"] == "3"


def test_is_asked_directly_for_longer_and_longer_when_its_verdicts_keep_falling() -> None:
    counted, standing = Counted(), Standing()
    noting = []
    counted.check = dataclasses.replace(
        counted.check, judge=lambda f: (noting.append(type(f) is not Facts), counted.judge(f))[1]
    )
    for number in range(40):
        standing.judge(counted.check, changed(nested=("layer",), optimizers=number))
    assert counted.asked == 40
    assert [i for i, noted in enumerate(noting) if noted] == [0, 2, 5, 10, 19, 36]


def test_saved_file_that_is_looked_at_lets_nothing_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has facts of its own, in which all else is empty."""
    fell, turn_to = [], Standing._turn_to

    def counted(self: Standing, given: Facts) -> None:
        before = {code for code, known in self._known.items() if known.standing is not None}
        turn_to(self, given)
        fell.append(len(before) - len([c for c in before if self._known[c].standing is not None]))

    monkeypatch.setattr(Standing, "_turn_to", counted)
    model = lora()
    optimizer = adamw(model)
    with LoraProbeMonitor(model, optimizer, every_n_steps=1, ignore=("LP307", "LP405"), verbose=False) as probe:
        for number, batch in enumerate(batches(12)):
            next_token_loss(model, batch, number).backward()
            optimizer.step()
            optimizer.zero_grad()
            if number == 9:
                model.save_pretrained(tmp_path)
                fell.clear()
                assert probe.check_saved(tmp_path).healthy
    assert len(fell) == 3  # two decisions, and the one at the end
    assert max(fell[:2]) < 10  # those that judge files


@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.code)
def test_notes_change_no_verdict_of_the_catalogue(check: Check) -> None:
    for given in (
        HEALTHY,
        facts(modes=("merged", "active")),
        facts(gradients=(GRADIENT,) * 4, step=0),
        Facts("start", None, 0, 0, (), False, (), (), (), (), ()),
    ):
        assert Standing().judge(check, given) == check.judge(given)


@pytest.mark.parametrize("recipe", parameters([r for r in RECIPES if r.step]))
def test_verdicts_of_real_runs_are_those_that_a_check_gives_directly(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands, judge = [], Standing.judge

    def compared(self: Standing, check: Check, given: Facts) -> Verdict:
        verdict = judge(self, check, given)
        stands.append(verdict)
        assert verdict == check.judge(given), check.code
        return verdict

    monkeypatch.setattr(Standing, "judge", compared)
    watched = watch(recipe.build(), every_n_steps=1, **recipe.intent)
    assert stands
    assert not watched.report.internal_errors, watched.report.internal_errors
