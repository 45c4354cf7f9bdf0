"""The checks of what was declared, asked for and held at the start, on facts made by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from facts import STILL, ZERO, bad, facts

from lora_probe_callbacks.checks import (
    bare_experts,
    dead_pair,
    erased,
    frozen_head,
    lagged_adapter,
    reference_not_disabled,
    scaling,
    uneven_rate,
    unmatched_pattern,
    unmet_target,
    untied_copy,
    untrained_part,
    untrained_token,
    wrong_start,
)
from lora_probe_callbacks.observe.facts import (
    Coverage,
    Facts,
    OtherAdapter,
    ReferenceFact,
    Request,
    StartFact,
    TokenTable,
    UnitStart,
    UpdateFact,
)

FRESH = UnitStart(a=0.1, b=0.0, product=0.0, moves_base=False)
TRAINED = UnitStart(a=0.1, b=0.1, product=0.3, moves_base=False)
ORTHOGONAL = UnitStart(a=0.1, b=0.1, product=1e-4, moves_base=False)
DEAD = UnitStart(a=0.0, b=0.0, product=0.0, moves_base=False)
PISSA = UnitStart(a=0.1, b=0.1, product=0.3, moves_base=True)


def started(*units: UnitStart | None, step: int = 0, state: bool = False, **changes: Any) -> Facts:
    return facts(start=StartFact(tuple(units), step, state), **changes)


def covered(**changes: Any) -> Facts:
    return facts(coverage=Coverage(**changes))


# --- LP109 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "status"),
    [
        (None, "skipped"),
        (ReferenceFact(disabled=False, active=0), "pending"),
        (ReferenceFact(disabled=False, active=3), "pending"),
        (ReferenceFact(disabled=False, active=4), "fail"),
        (ReferenceFact(disabled=True, active=9), "pass"),
    ],
)
def test_reference_that_is_never_disabled(reference: ReferenceFact | None, status: str) -> None:
    assert reference_not_disabled.judge(facts(reference=reference)).status == status


# --- LP210 --------------------------------------------------------------------------------------


def rates(*units: tuple[str, float, float]) -> Facts:
    """Part of B, rate of A, rate of B, of each unit."""
    what = facts(units=len(units))
    slots = []
    for slot in what.slots:
        part, a, b = units[slot.unit]
        slots.append(dataclasses.replace(slot, learning_rate=a if slot.role == "A" else b, part=part))
    return dataclasses.replace(what, slots=tuple(slots))


def test_kind_of_b_with_the_rate_of_a_warns() -> None:
    what = rates(("lora_B", 1e-4, 1e-3), ("lora_embedding_B", 1e-4, 1e-4))
    assert bad(what)["LP210"].slots == {3}


@pytest.mark.parametrize(
    "units",
    [
        [("lora_B", 1e-4, 1e-4), ("lora_embedding_B", 1e-4, 1e-4)],
        [("lora_B", 1e-4, 1e-3), ("lora_embedding_B", 1e-4, 1e-3)],
        [("lora_B", 1e-4, 1e-3), ("lora_embedding_B", 1e-6, 1e-6)],
        [("lora_B", 1e-4, 1e-3), ("lora_B", 1e-4, 1e-4)],
        [("lora_B", 1e-4, 1e-3), ("lora_B", 1e-4, 2e-3), ("lora_embedding_B", 1e-4, 1e-4)],
    ],
)
def test_other_rates_pass(units: list[tuple[str, float, float]]) -> None:
    assert uneven_rate.judge(rates(*units)).status == "pass"


def test_rates_of_zero_or_unknown_are_not_judged() -> None:
    assert uneven_rate.judge(facts(slot={"learning_rate": 0.0})).status == "pending"
    assert uneven_rate.judge(facts(slot={"learning_rate": None})).status == "pending"
    assert uneven_rate.judge(facts(slot={"learning_rate": float("nan")})).status == "pending"


# --- LP407 --------------------------------------------------------------------------------------

ERASED = UpdateFact(start=1.0, moved=1.0, size=1.0, norm=0.01, finite=True)


def test_every_b_erased_fails() -> None:
    verdict = bad(facts(updates=[STILL, ERASED, STILL, ERASED]))["LP407"]
    assert verdict.slots == {1, 3}
    assert verdict.of_update


@pytest.mark.parametrize(
    ("update", "slot", "status"),
    [
        (dataclasses.replace(ERASED, norm=0.1), {}, "pass"),  # a tenth is left
        (dataclasses.replace(ERASED, finite=False), {}, "pass"),  # LP501
        (dataclasses.replace(ERASED, start=0.0), {}, "pending"),  # there was nothing to erase
        (ERASED, {"learning_rate": 0.02}, "pass"),  # 10 * 0.02 * sqrt(32) is above 1
        (ERASED, {"learning_rate": 0.017}, "fail"),
        (ERASED, {"learning_rate": 0.01, "weight_decay": 50.0}, "pass"),
        (ERASED, {"learning_rate": None}, "pass"),
        (ERASED, {"frozen_by_intent": True}, "pending"),
    ],
)
def test_change_that_something_explains_passes(update: UpdateFact, slot: dict[str, Any], status: str) -> None:
    assert erased.judge(facts(updates=[STILL, update] * 2, slot=slot)).status == status


def test_one_layer_erased_of_two_passes() -> None:
    assert erased.judge(facts(updates=[STILL, ERASED, STILL, STILL])).status == "pass"
    assert erased.judge(facts(update=None)).status == "pending"


# --- LP408 --------------------------------------------------------------------------------------


def teacher(**changes: Any) -> OtherAdapter:
    settings: dict[str, Any] = {
        "name": "teacher",
        "declared": "lagged",
        "tensors": 4,
        "trainable": 0,
        "owned": 0,
        "changed": (),
        "was_active": False,
        "ever_changed": False,
        "active_now": False,
    }
    return OtherAdapter(**{**settings, **changes})


@pytest.mark.parametrize(
    ("other", "step", "status"),
    [
        (teacher(declared=None, was_active=True), 4, "skipped"),
        (teacher(still=0), 4, "pass"),
        (teacher(still=0), 1, "pending"),
        (teacher(still=2, written=2), 4, "pending"),
        (teacher(still=3, written=3), 4, "fail"),
        (teacher(still=3, written=2), 4, "pending"),
        (teacher(still=2, half=True), 4, "pending"),
        (teacher(still=3, half=True), 4, "warn"),
        (teacher(still=16), 99, "pending"),
        (teacher(still=16), 100, "warn"),
        (teacher(still=15), 100, "pending"),
        (teacher(still=16, still_since=1), 100, "pending"),
    ],
)
def test_lagged_adapter(other: OtherAdapter, step: int, status: str) -> None:
    assert lagged_adapter.judge(facts(others=(other,), step=step)).status == status


def test_the_lagged_adapter_that_stands_is_named_beside_one_that_follows() -> None:
    others = (teacher(name="moves"), teacher(name="stands", still=5, written=5))
    assert "'stands'" in lagged_adapter.judge(facts(others=others)).message


# --- LP502, LP503 -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "natural", "status"),
    [
        (2.0, 2.0, "pass"),
        (2.0 * (1 + 1e-8), 2.0, "pass"),
        (2.0 * (1 + 1e-5), 2.0, "warn"),
        (0.0, 2.0, "fail"),
        (0.0, 0.0, "fail"),
        (-2.0, 2.0, "warn"),
        (None, None, "skipped"),
        (1.0, None, "pass"),
    ],
)
def test_scaling(got: float | None, natural: float | None, status: str) -> None:
    assert scaling.judge(facts(unit={"scaling": got, "natural": natural})).status == status


def test_zero_scaling_explains_zero_gradients() -> None:
    what = facts(unit={"scaling": 0.0, "natural": 2.0}, gradients=[ZERO] * 4, history={"zero": 4, "had_signal": False})
    assert list(bad(what)) == ["LP502"]


def test_zero_scaling_of_a_part_warns() -> None:
    what = facts(unit={"scaling": 2.0, "natural": 2.0})
    units = (dataclasses.replace(what.units[0], scaling=0.0), what.units[1])
    verdict = scaling.judge(dataclasses.replace(what, units=units))
    assert (verdict.status, verdict.slots) == ("warn", {0, 1})


@pytest.mark.parametrize(
    ("units", "status"),
    [
        ((FRESH, FRESH), "pass"),
        ((DEAD, TRAINED), "fail"),
        ((None, None), "skipped"),
        ((None, DEAD), "fail"),
        ((UnitStart(0.0, 0.1, 0.0, moves_base=False), FRESH), "pass"),
    ],
)
def test_dead_pair(units: tuple[UnitStart | None, ...], status: str) -> None:
    assert dead_pair.judge(started(*units)).status == status
    assert dead_pair.judge(facts()).status == "pending"


def test_dead_pair_explains_zero_gradients_and_a_fresh_start() -> None:
    what = started(DEAD, DEAD, resumed=True, gradients=[ZERO] * 4, history={"zero": 4, "had_signal": False})
    assert list(bad(what)) == ["LP503"]


# --- LP504 --------------------------------------------------------------------------------------

AGAINST = ReferenceFact(disabled=True, active=0)


@pytest.mark.parametrize(
    ("what", "status", "cause"),
    [
        (started(FRESH, FRESH, resumed=False), "pass", ""),
        (started(ORTHOGONAL, FRESH, resumed=False), "pass", ""),
        (started(TRAINED, FRESH, resumed=False), "fail", "fresh"),
        (started(TRAINED, TRAINED, resumed=True), "pass", ""),
        (started(FRESH, FRESH, resumed=True), "fail", "resumed"),
        (started(FRESH, TRAINED, resumed=True), "warn", "resumed in part"),
        (started(FRESH, FRESH), "pass", ""),
        (started(FRESH, FRESH, step=7), "warn", "step without adapter"),
        (started(FRESH, FRESH, state=True), "warn", "step without adapter"),
        (started(FRESH, FRESH, step=7, resumed=False), "pass", ""),
        (started(TRAINED, TRAINED, step=7), "pass", ""),
        (started(TRAINED, TRAINED, reference=AGAINST), "warn", "reference"),
        (started(TRAINED, TRAINED, reference=AGAINST, resumed=True), "warn", "reference"),
        (started(TRAINED, TRAINED, reference=AGAINST, step=7), "pass", ""),
        (started(TRAINED, TRAINED, reference=AGAINST, state=True), "pass", ""),
        (started(FRESH, FRESH, reference=AGAINST), "pass", ""),
        (started(PISSA, PISSA, reference=AGAINST), "fail", "residual"),
        (started(PISSA, PISSA, resumed=False), "skipped", ""),
        (started(PISSA, TRAINED, resumed=False), "fail", "fresh"),
        (started(None, None, resumed=True), "skipped", ""),
        (started(FRESH, FRESH, resumed=True, rewrapped=("model",)), "skipped", ""),
        (facts(resumed=True), "pending", ""),
    ],
)
def test_start(what: Facts, status: str, cause: str) -> None:
    verdict = wrong_start.judge(what)
    assert (verdict.status, verdict.cause) == (status, cause)


# --- LP6xx --------------------------------------------------------------------------------------

TYPO = Request("default", "target_modules", "q_porj", exists=False)


@pytest.mark.parametrize(
    ("coverage", "status", "cause"),
    [
        (Coverage(), "pass", ""),
        (Coverage(expected=(("vision", 2), ("language", 0))), "fail", "expected"),
        (Coverage(expected=(("vision", 2),)), "pass", ""),
        (Coverage(unmet=(TYPO,)), "warn", "target_modules"),
        (Coverage(unmet=(TYPO,), expected=(("q_proj", 2),)), "pass", ""),  # what counts is covered
        (Coverage(unmet=(TYPO,), expected=(("q_proj", 0),)), "fail", "expected"),
        (Coverage(sparse=(("layers", 4, 56),)), "warn", "sparse"),
        (Coverage(sparse=(("layers", 4, 56),), expected=(("q_proj", 4),)), "pass", ""),
    ],
)
def test_targets(coverage: Coverage, status: str, cause: str) -> None:
    verdict = unmet_target.judge(facts(coverage=coverage))
    assert (verdict.status, verdict.cause) == (status, cause)


@pytest.mark.parametrize(
    "check", [unmet_target, unmatched_pattern, frozen_head, bare_experts, untied_copy], ids=lambda m: m.__name__
)
def test_before_the_first_forward_nothing_is_judged(check: Any) -> None:
    assert check.judge(facts()).status == "pending"
    assert check.judge(covered()).status == "pass"


def test_what_is_missed_is_warned_of_by_one_check_each() -> None:
    assert list(bad(covered(patterns=(("rank_pattern", "q_porj"),)))) == ["LP602"]
    assert list(bad(covered(fresh_heads=("score",)))) == ["LP603"]
    assert list(bad(covered(experts=("experts.down_proj",)))) == ["LP606"]
    assert list(bad(covered(experts=("experts.down_proj",), expected=(("q_proj", 1),)))) == []
    assert list(bad(covered(experts=("experts.down_proj",), expected=(("experts", 0),)))) == ["LP601"]
    assert list(bad(covered(untied=(("lm_head", "embed_tokens"),)))) == ["LP607"]


def tables(*untrained: tuple[int, ...], rows: int = 8) -> Facts:
    sides: tuple[Any, Any] = ("input", "output")
    found = tuple(TokenTable(s, s, rows, u) for s, u in zip(sides, untrained, strict=False))
    return facts(new_tokens=(6, 7), coverage=Coverage(tokens=found))


@pytest.mark.parametrize(
    ("what", "status", "cause"),
    [
        (facts(), "skipped", ""),
        (facts(new_tokens=(6,)), "pending", ""),
        (facts(new_tokens=(6,), coverage=Coverage()), "skipped", ""),
        (tables((), ()), "pass", ""),
        (tables((), (6, 7)), "pass", ""),  # an untied head may stay
        (tables((6, 7), (6, 7)), "fail", "frozen"),
        (tables((7,), (6, 7)), "fail", "frozen"),
        (tables((6, 7), ()), "warn", "input"),
        (tables((6, 7)), "fail", "frozen"),
        (tables((7,), (7,), rows=7), "fail", "beyond"),
    ],
)
def test_new_tokens(what: Facts, status: str, cause: str) -> None:
    verdict = untrained_token.judge(what)
    assert (verdict.status, verdict.cause) == (status, cause)


def parts(magnitude: bool, **changes: Any) -> Facts:
    """A, and a magnitude in place of B, in each of two layers."""
    what = facts(slot={"part": "lora_A"}, **changes)
    slots = tuple(
        s
        if s.role == "A"
        else dataclasses.replace(s, role="other", part="lora_magnitude_vector", requires_grad=magnitude)
        for s in what.slots
    )
    return dataclasses.replace(what, slots=slots)


def test_part_that_is_frozen_as_a_whole_fails_and_is_told_once() -> None:
    what = parts(magnitude=False, history={"had_gradient": False, "had_signal": False})
    assert list(bad(what)) == ["LP605"]
    assert bad(what)["LP605"].slots == {1, 3}
    assert untrained_part.judge(parts(magnitude=True)).status == "pass"


def test_part_that_trained_before_has_its_turn_again() -> None:
    assert untrained_part.judge(parts(magnitude=False)).status == "pass"


def test_part_of_another_optimizer_waits_for_its_event() -> None:
    what = parts(magnitude=False, history={"had_gradient": False}, optimizers=2)
    slots = tuple(dataclasses.replace(s, owner=1) if s.role == "other" else s for s in what.slots)
    assert untrained_part.judge(dataclasses.replace(what, slots=slots)).status == "pass"


def test_frozen_adapter_is_left_to_its_own_check() -> None:
    what = parts(magnitude=False, history={"had_gradient": False, "had_signal": False})
    slots = tuple(dataclasses.replace(s, requires_grad=False) for s in what.slots)
    assert list(bad(dataclasses.replace(what, slots=slots))) == ["LP203"]


def test_part_that_was_never_made_fails() -> None:
    assert list(bad(covered(unmade=(("lora_magnitude_vector", ("q_proj",)),)))) == ["LP605"]
