from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from support.facts import bad, expect, facts, with_slots

from lora_probe_callbacks.checks.coverage.untrained_part import CHECK, judge
from lora_probe_callbacks.facts import (
    Coverage,
    Facts,
)

PART = "lora_magnitude_vector"
NEW = {"had_gradient": False, "had_signal": False}


def parts(magnitude: bool, a: bool = True, at: Mapping[int, Any] | None = None, **changes: Any) -> Facts:
    """A, and a magnitude in place of B, in each of two layers."""
    own = {"role": "other", "part": PART, "requires_grad": magnitude}
    both = {"part": "lora_A", "requires_grad": a}, own
    return facts(at={i: {**both[i % 2], **(at or {}).get(i, {})} for i in range(4)}, **changes)


def changed(what: Facts, slot: int, **changes: Any) -> Facts:
    columns = {name: list(getattr(what.slots, name)) for name in changes}
    for name, value in changes.items():
        columns[name][slot] = value
    texts = {name: tuple(column) for name, column in columns.items() if name in ("part", "name", "adapter")}
    return with_slots(what, **{name: np.array(column) for name, column in columns.items()} | texts)


def test_part_that_is_frozen_as_a_whole_fails_and_is_told_once() -> None:
    what = parts(magnitude=False, history=NEW)
    assert list(bad(what)) == ["LP605"]
    expect(
        judge(what),
        "fail",
        f"every {PART} of the adapter is frozen, 2 tensors, while the rest trains: layer.0.lora_B, layer.1.lora_B",
        slots=[1, 3],
        cause=PART,
        got="0 of 2 trainable",
        expected=f"2 of 2, or frozen=('{PART}',)",
        fix=f"if they are meant to stay, pass frozen=('{PART}',)",
    )


def test_part_that_trains_passes() -> None:
    expect(judge(parts(magnitude=True, history=NEW)), "pass")
    expect(CHECK.judge(facts()), "pass")


def test_part_that_trains_in_one_layer_passes() -> None:
    assert judge(changed(parts(magnitude=False, history=NEW), 1, requires_grad=True)).status == "pass"


def test_every_part_is_looked_at() -> None:
    what = changed(parts(magnitude=False, history=NEW), 1, part="bias", requires_grad=True)
    assert judge(what).cause == PART


def test_part_that_had_its_turn_does_not_hide_the_next() -> None:
    what = changed(parts(magnitude=False, history=NEW, at={1: {"had_gradient": True}}), 1, part="bias")
    assert judge(what).slots == {3}


def test_part_that_trained_before_has_its_turn_again() -> None:
    assert judge(parts(magnitude=False)).status == "pass"
    assert judge(parts(magnitude=False, history=NEW, at={3: {"had_gradient": True}})).status == "pass"
    assert judge(parts(magnitude=False, history=NEW, at={0: {"had_gradient": True}})).status == "fail"


@pytest.mark.parametrize(
    ("optimizers", "owner", "status"), [(2, 1, "pass"), (2, 0, "fail"), (2, None, "fail"), (1, 1, "fail")]
)
def test_part_of_another_optimizer_waits_for_its_event(optimizers: int, owner: int | None, status: str) -> None:
    what = parts(magnitude=False, history=NEW, optimizers=optimizers)
    others = np.where(what.slots.role == "other", -1 if owner is None else owner, what.slots.owner)
    assert judge(with_slots(what, owner=others)).status == status


def test_part_that_is_meant_to_stay_passes() -> None:
    what = parts(magnitude=False, history=NEW)
    what = changed(changed(what, 1, frozen_by_intent=True), 3, frozen_by_intent=True)
    expect(judge(what), "pass")


@pytest.mark.parametrize(("mode", "status"), [("merged", "fail"), ("disabled", "pending"), ("inactive", "pending")])
def test_adapter_that_is_not_active_is_not_judged(mode: Any, status: str) -> None:
    verdict = judge(parts(magnitude=False, history=NEW, modes=[mode] * 2))
    assert verdict.status == status
    if status == "pending":
        expect(verdict, "pending", "the adapter is not active at this moment")


def test_frozen_adapter_is_left_to_its_own_check() -> None:
    what = parts(magnitude=False, a=False, history=NEW)
    assert judge(what).status == "pass"
    assert list(bad(what)) == ["LP203"]


def test_part_that_was_never_made_fails() -> None:
    what = facts(coverage=Coverage(unmade=((PART, ("layer.0", "layer.1")), ("bias", ("layer.0",)))))
    expect(
        judge(what),
        "fail",
        f"2 adapted layers have no {PART}, which the configuration asks for: layer.0, layer.1",
        cause=PART,
        got=f"{PART} missing in 2 layers",
        expected=f"{PART} in each of them",
        fix="attach the adapter anew from its configuration",
    )
    assert list(bad(what)) == ["LP605"]
    assert judge(facts(coverage=Coverage())).status == "pass"


def test_part_of_the_first_optimizer_waits_for_its_event() -> None:
    what = parts(magnitude=False, history=NEW, optimizers=2, optimizer=1)
    assert judge(what).status == "pass"


def test_rest_that_is_not_active_does_not_count() -> None:
    """Only what is on at this moment tells whether something trains."""
    what = parts(magnitude=False, a=False, history=NEW)
    assert judge(what).status == "pass"
