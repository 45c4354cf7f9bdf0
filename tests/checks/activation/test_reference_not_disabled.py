from __future__ import annotations

import pytest
from support.facts import bad, expect, facts

from lora_probe_callbacks.checks.activation.reference_not_disabled import CHECK, judge
from lora_probe_callbacks.facts import (
    ReferenceFact,
)


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
    assert judge(facts(reference=reference)).status == status


def test_reference_with_the_adapter_on_is_told() -> None:
    what = facts(reference=ReferenceFact(disabled=False, active=5))
    expect(
        judge(what),
        "fail",
        "no forward ran with the adapters disabled, and forwards beside training had them active in 5 probed steps",
        cause="active",
        got="every forward without gradients with ['default'] active",
        expected="the reference forward with the adapters disabled",
    )
    assert list(bad(what)) == ["LP109"]


def test_what_cannot_be_judged_says_why() -> None:
    expect(CHECK.judge(facts()), "skipped", "the reference was not declared to be the disabled model")
    none = facts(reference=ReferenceFact(disabled=False, active=0))
    expect(judge(none), "pending", "no forward with the adapters disabled was seen")


def test_training_forward_that_is_disabled_is_left_to_its_own_check() -> None:
    what = facts(modes=("disabled", "disabled"), reference=ReferenceFact(disabled=True, active=0))
    assert list(bad(what)) == ["LP102"]
