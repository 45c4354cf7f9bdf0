"""Facts about the supervised tokens of one step, made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from support.facts import facts

from lora_probe_callbacks.facts import Facts, Supervision, SupervisionTotals

ROWS, WIDTH = 4, 12


def supervised(*, totals: dict[str, int] | None = None, **columns: Any) -> Facts:
    """A fifth step with four rows of twelve tokens each: a prompt of six, then an answer of six.

    Columns change it, ``totals`` the sums; ``stop_tokens`` and ``has_tokenizer`` are those of the run.
    """
    known = {name: columns.pop(name) for name in ("stop_tokens", "has_tokenizer") if name in columns}
    plain: dict[str, Any] = {
        "width": WIDTH,
        "real": WIDTH,
        "supervised": 6,
        "meant": 6,
        "padding": 0,
        "masked": 0,
        "prompt": 6,
        "stops": 1,
        "cut_stops": 0,
    }
    numbers = {name: columns.pop(name, value) for name, value in plain.items()}
    arrays = {name: np.broadcast_to(np.asarray(value, np.int64), ROWS) for name, value in numbers.items()}
    sums = {"read": 24, "following": 24, "same": 0, "skipping": 1}
    step = Supervision(**arrays, **{**sums, **columns})
    before = SupervisionTotals(steps=4, rows=4 * ROWS, real=4 * ROWS * WIDTH, supervised=4 * ROWS * 6)
    return facts(
        supervision=step,
        supervision_totals=SupervisionTotals(**(vars_of(before.after(step)) | (totals or {}))),
        **known,
    )


def vars_of(totals: SupervisionTotals) -> dict[str, int]:
    """Its fields, of which it keeps no dictionary."""
    return {name: getattr(totals, name) for name in SupervisionTotals.__dataclass_fields__}
