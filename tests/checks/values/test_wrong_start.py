from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, bad, expect, facts, resumed

from lora_probe_callbacks.checks.values.wrong_start import CHECK, judge
from lora_probe_callbacks.facts import (
    Facts,
    ReferenceFact,
    StartFact,
    UnitStart,
)

FRESH = UnitStart(a=0.1, b=0.0, product=0.0, moves_base=False)


TRAINED = UnitStart(a=0.1, b=0.1, product=0.3, moves_base=False)


ORTHOGONAL = UnitStart(a=0.1, b=0.1, product=1e-4, moves_base=False)


PISSA = UnitStart(a=0.1, b=0.1, product=0.3, moves_base=True)


def started(*units: UnitStart | None, step: int = 0, state: bool = False, **changes: Any) -> Facts:
    return facts(start=StartFact(tuple(units), step, state), **changes)


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
        (started(FRESH, TRAINED, step=7), "pass", ""),
        (started(TRAINED, TRAINED, reference=AGAINST), "warn", "reference"),
        (started(TRAINED, TRAINED, reference=AGAINST, resumed=True), "pass", ""),
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
    verdict = judge(what)
    assert (verdict.status, verdict.cause) == (status, cause)


@pytest.mark.parametrize(
    ("unit", "identity"),
    [
        (UnitStart(0.0, 1.0, 0.5, moves_base=False), True),
        (UnitStart(1.0, 0.0, 0.5, moves_base=False), True),
        (UnitStart(1.0, 1.0, 0.0099, moves_base=False), True),
        (UnitStart(1.0, 1.0, 0.01, moves_base=False), False),
    ],
)
def test_identity(unit: UnitStart, identity: bool) -> None:
    assert judge(started(unit, FRESH, resumed=False)).status == ("pass" if identity else "fail")


def test_new_adapter_that_is_not_the_identity_is_told() -> None:
    what = started(FRESH, TRAINED, resumed=False)
    expect(
        judge(what),
        "fail",
        "the new adapter is not the identity: BA is not zero in 1 of 2 adapted layers, layer.1",
        slots=[2, 3],
        cause="fresh",
        got="BA other than 0 in 1 layers before the first step, with resumed=False",
        expected="BA = 0: the model starts as its base",
        fix="if the adapter was restored, pass resumed=True",
    )
    assert list(bad(what)) == ["LP504"]


def test_restored_adapter_that_is_fresh_is_told() -> None:
    expect(
        judge(started(FRESH, None, resumed=True)),
        "fail",
        "the restored adapter is a fresh one: BA is exactly zero in all 1 adapted layers",
        slots=[0, 1],
        cause="resumed",
        got="B = 0 everywhere, with resumed=True",
        expected="the values of the checkpoint",
        fix="see that set_peft_model_state_dict() reports no missing key",
    )
    expect(
        judge(started(TRAINED, FRESH, resumed=True)),
        "warn",
        "1 of 2 adapted layers of the restored adapter are fresh: layer.1",
        slots=[2, 3],
        cause="resumed in part",
        got="B = 0 in 1 layers, with resumed=True",
        expected="the values of the checkpoint",
        fix="compare the keys of the checkpoint with the model's",
    )


@pytest.mark.parametrize(
    ("start", "state"), [({"step": 7}, "framework step 7"), ({"state": True}, "an optimizer with a state")]
)
def test_step_without_its_adapter_is_told(start: dict[str, Any], state: str) -> None:
    expect(
        judge(started(FRESH, ORTHOGONAL, **start)),
        "warn",
        f"training goes on at {state}, and the adapter is fresh: BA is exactly zero in all 2 adapted layers",
        slots=ALL,
        cause="step without adapter",
        got=f"B = 0 everywhere, and {state}",
        expected="the adapter of that step",
        fix="if this adapter is new, pass resumed=False",
    )


def test_initialisation_that_moves_the_base_is_told_beside_a_disabled_reference() -> None:
    expect(
        judge(started(FRESH, PISSA, reference=AGAINST)),
        "fail",
        "the reference is not the base model: the initialisation has taken BA out of 1 base weights, layer.1",
        slots=[2, 3],
        cause="residual",
        got="reference='disabled' beside an initialisation that changes the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)",
        expected="a reference that is the model of step 0",
        fix="keep a frozen copy of the fresh adapter as the reference",
    )


def test_reference_that_is_not_where_the_policy_starts_is_told() -> None:
    expect(
        judge(started(TRAINED, FRESH, reference=AGAINST)),
        "warn",
        "the reference is not where the policy starts: 1 of 2 adapted layers are trained already",
        slots=[0, 1],
        cause="reference",
        got="BA other than 0 in 1 layers at the first step, with reference='disabled'",
        expected="policy = reference at step 0, as with a fresh adapter",
        fix="if it should compare with the base model, nothing is wrong",
    )


def test_what_cannot_be_judged_says_why() -> None:
    expect(CHECK.judge(facts()), "pending", "no training forward has begun")
    expect(judge(started(None, None)), "skipped", "no expected layer has a pair of A and B that can be read")
    expect(judge(started(PISSA)), "skipped", "the initialisation takes BA out of the base weight")
    expect(judge(started(FRESH, rewrapped=("model",), resumed=True)), "skipped", "explained by LP107")


def test_fingerprint_of_a_checkpoint_tells_more() -> None:
    assert list(bad(started(FRESH, FRESH, resumed=True, restored=resumed(fresh=True)))) == ["LP803"]
