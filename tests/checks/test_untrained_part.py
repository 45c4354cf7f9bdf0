from __future__ import annotations

import dataclasses
from typing import Any

from facts import bad, facts

from lora_probe_callbacks.checks.untrained_part import judge
from lora_probe_callbacks.observe.facts import (
    Coverage,
    Facts,
)


def covered(**changes: Any) -> Facts:
    return facts(coverage=Coverage(**changes))


def parts(magnitude: bool, **changes: Any) -> Facts:
    """A, and a magnitude in place of B, in each of two layers."""
    what = facts(slot={"part": "lora_A"}, **changes)
    slots = tuple(
        s if s.role == "A" else s._replace(role="other", part="lora_magnitude_vector", requires_grad=magnitude)
        for s in what.slots
    )
    return dataclasses.replace(what, slots=slots)


def test_part_that_is_frozen_as_a_whole_fails_and_is_told_once() -> None:
    what = parts(magnitude=False, history={"had_gradient": False, "had_signal": False})
    assert list(bad(what)) == ["LP605"]
    assert bad(what)["LP605"].slots == {1, 3}
    assert judge(parts(magnitude=True)).status == "pass"


def test_part_that_trained_before_has_its_turn_again() -> None:
    assert judge(parts(magnitude=False)).status == "pass"


def test_part_of_another_optimizer_waits_for_its_event() -> None:
    what = parts(magnitude=False, history={"had_gradient": False}, optimizers=2)
    slots = tuple(s._replace(owner=1) if s.role == "other" else s for s in what.slots)
    assert judge(dataclasses.replace(what, slots=slots)).status == "pass"


def test_frozen_adapter_is_left_to_its_own_check() -> None:
    what = parts(magnitude=False, history={"had_gradient": False, "had_signal": False})
    slots = tuple(s._replace(requires_grad=False) for s in what.slots)
    assert list(bad(dataclasses.replace(what, slots=slots))) == ["LP203"]


def test_part_that_was_never_made_fails() -> None:
    assert list(bad(covered(unmade=(("lora_magnitude_vector", ("q_proj",)),)))) == ["LP605"]
