from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.facts import facts

from lora_probe_callbacks.checks.activation.eval_mode import CHECK
from lora_probe_callbacks.facts import Facts


def ran(*, received: bool = True, **changes: Any) -> Facts:
    what = facts()
    (forward,) = what.forwards
    return dataclasses.replace(what, forwards=(dataclasses.replace(forward, received=received, **changes),))


@pytest.mark.parametrize(
    ("changes", "status", "cause"),
    [
        ({}, "pass", ""),
        ({"in_eval": frozenset({1})}, "warn", "dropout"),
        ({"unchecked": 2}, "warn", "checkpointing"),
        ({"in_eval": frozenset({0}), "unchecked": 2}, "warn", "dropout"),
        ({"in_eval": frozenset({1}), "received": False}, "pending", ""),  # a forward beside training
    ],
)
def test_what_was_configured_for_training_acts(changes: dict[str, Any], status: str, cause: str) -> None:
    verdict = CHECK.judge(ran(**changes))
    assert (verdict.status, verdict.cause) == (status, cause)
    assert CHECK.code == "LP111"


def test_layers_are_named() -> None:
    assert "layer.1" in CHECK.judge(ran(in_eval=frozenset({1}))).message
