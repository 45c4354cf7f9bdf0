from __future__ import annotations

import pytest
from facts import facts

from lora_probe_callbacks.checks.reference_not_disabled import judge
from lora_probe_callbacks.observe.facts import (
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
