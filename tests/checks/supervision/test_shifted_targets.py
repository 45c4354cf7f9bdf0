from __future__ import annotations

from typing import Any

import pytest
from support.facts import ALL, facts
from support.supervision import supervised

from lora_probe_callbacks.checks.supervision.shifted_targets import CHECK, judge


@pytest.mark.parametrize(
    ("columns", "status"),
    [
        ({}, "pass"),
        ({"following": 1, "skipping": 22}, "fail"),
        ({"following": 1, "same": 22, "has_tokenizer": True}, "warn"),
        ({"following": 1, "same": 21, "has_tokenizer": True}, "pass"),
        ({"following": 1, "same": 22}, "pass"),
        ({"following": 1, "same": 21, "skipping": 21}, "pass"),  # 21 of 24 is less than nine tenths
        ({"following": 13, "skipping": 24}, "pass"),  # rows of one repeated token
        ({"following": 12, "skipping": 24}, "fail"),
        ({"following": 0, "same": 0, "skipping": 0}, "pass"),  # a distribution of a teacher, or a masked model
        ({"read": 7, "following": 0, "skipping": 7}, "pending"),
        ({"read": 8, "following": 0, "skipping": 8}, "fail"),
        ({"following": 1, "skipping": 22, "causal": False}, "pending"),
    ],
)
def test_shifted_targets(columns: dict[str, Any], status: str) -> None:
    assert CHECK.code == "LP005"
    assert judge(supervised(**columns)).status == status


def test_it_says_which_way() -> None:
    twice = judge(supervised(following=1, skipping=22))
    assert twice.message == "the targets are shifted twice: each position is taught the token after the next"
    assert twice.evidence["got"] == "22 of 24 targets are the token after the next, and 1 the next"
    assert "shifts its labels itself" in twice.fix
    assert twice.slots == ALL
    never = judge(supervised(following=1, same=24, has_tokenizer=True))
    assert "the token that it has just read" in never.message
    assert "logits[:, :-1]" in never.fix
    assert twice.cause != never.cause


def test_nothing_to_look_at_is_no_pass() -> None:
    assert judge(facts()).status == "pending"
