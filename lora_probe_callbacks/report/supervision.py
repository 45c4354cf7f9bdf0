"""What the loss is made of, to be looked at: a few numbers, and the first rows as text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lora_probe_callbacks.facts import SampleRow, SupervisionTotals

__all__ = ["SupervisionReport"]

_OPEN, _CLOSE = "\u27e6", "\u27e7"  # around what the loss asks for


@dataclass(frozen=True)
class SupervisionReport:
    """The supervised tokens of a run, from its probed steps.

    Attributes:
        totals: Sums over the probed steps.
        rows: The first rows of the first probed batch, up to 512 tokens of each.
        tokenizer: Of the model; without one rows are shown as ids.
    """

    totals: SupervisionTotals
    rows: tuple[SampleRow, ...] = ()
    tokenizer: Any = None

    @property
    def token_fraction(self) -> float:
        """Supervised tokens, as a part of those that are no padding."""
        return self.totals.supervised / max(1, self.totals.real)

    @property
    def empty_row_fraction(self) -> float:
        """Rows without a supervised token, as a part of all."""
        return self.totals.empty_rows / max(1, self.totals.rows)

    def text(self, row: SampleRow) -> str:
        """One row, special tokens visible, with what the loss asks for between \u27e6 and \u27e7."""
        parts = []
        pairs = zip(row.tokens, row.supervised, strict=True)
        for supervised, group in groupby(pairs, key=lambda pair: pair[1]):
            shown = self._decoded([token for token, _ in group])
            parts.append(f"{_OPEN}{shown}{_CLOSE}" if supervised else shown)
        return "".join(parts) if self.tokenizer is not None else " ".join(parts)

    def _decoded(self, tokens: list[int]) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        inner = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        return str(inner.decode(tokens, skip_special_tokens=False))

    def __str__(self) -> str:
        totals = self.totals
        lines = [
            f"{totals.supervised} of {totals.real} tokens supervised ({self.token_fraction:.0%}), "
            f"{totals.empty_rows} of {totals.rows} rows without any, {totals.stops} stop tokens among the targets"
        ]
        return "\n".join(lines + [f"row {i}: {self.text(row)}" for i, row in enumerate(self.rows)])
