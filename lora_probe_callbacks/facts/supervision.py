"""What the loss was made of: the tokens whose hidden states received a gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lora_probe_callbacks.facts.columns import Bools, Ints

__all__ = ["SampleRow", "Supervision", "SupervisionFacts", "SupervisionTotals"]


def _no_rows() -> Ints:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Supervision:
    """The rows of one step, those of all its micro-batches; every column has one entry a row.

    A position is **supervised** if the gradient at its last hidden state is not exactly zero. In a causal language
    model it predicts the token behind it, its **target**.

    Attributes:
        width: Positions of the row, padding included.
        real: Those of them that are no padding.
        supervised: Positions with a gradient.
        meant: Targets whose label is not -100; -1 where the forward was given no labels.
        padding: Supervised positions whose target is padding.
        masked: Supervised positions whose target the mask of the batch (completion, assistant) leaves out.
        prompt: Real positions before the first supervised one.
        stops: Supervised targets that are a stop token.
        cut_stops: Stop tokens directly behind a supervised target that are not supervised themselves.
        causal: The model is a causal language model; else only rows are counted.
        read: Targets that were read off the gradient of the logits, or labels where no logits were seen.
        following: How many of these are the token behind their position, as they should be.
        same: How many are the token at their position.
        skipping: How many are the token after the next.
    """

    width: Ints = field(default_factory=_no_rows)
    real: Ints = field(default_factory=_no_rows)
    supervised: Ints = field(default_factory=_no_rows)
    meant: Ints = field(default_factory=_no_rows)
    padding: Ints = field(default_factory=_no_rows)
    masked: Ints = field(default_factory=_no_rows)
    prompt: Ints = field(default_factory=_no_rows)
    stops: Ints = field(default_factory=_no_rows)
    cut_stops: Ints = field(default_factory=_no_rows)
    causal: bool = True
    read: int = 0
    following: int = 0
    same: int = 0
    skipping: int = 0

    def __len__(self) -> int:
        return len(self.width)

    @property
    def labelled(self) -> bool:
        """The forwards were given labels."""
        return len(self) > 0 and bool((self.meant >= 0).all())

    @property
    def empty(self) -> Bools:
        """Rows without a supervised token: by their labels where they have some, else by the gradient alone."""
        return np.asarray(np.where(self.meant >= 0, self.meant == 0, self.supervised == 0), np.bool_)

    @property
    def full(self) -> Bools:
        """Rows without padding: where the batch is cut to a length, these are the ones that may have been cut."""
        return np.asarray(self.real >= self.width)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row to be looked at.

    Attributes:
        tokens: Ids, without padding.
        supervised: Of each token, whether the loss asks for it.
    """

    tokens: tuple[int, ...]
    supervised: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class SupervisionTotals:
    """Sums over all probed steps so far.

    Attributes:
        steps: Steps that were looked at.
        empty_steps: Steps without one supervised token.
        empty_in_a_row: Such steps in a row up to now.
        rows: Rows that were looked at.
        empty_rows: Rows without a supervised token.
        empty_full: Those of them that fill the width of their batch.
        real: Tokens that are no padding.
        supervised: Supervised tokens.
        prompts: Rows that begin with tokens that are not supervised, and have some that are.
        stops: Supervised stop tokens.
        cut_stops: Stop tokens that were left out directly behind a supervised token.
        endings: Rows whose supervised part ends before the width of the batch does.
    """

    steps: int = 0
    empty_steps: int = 0
    empty_in_a_row: int = 0
    rows: int = 0
    empty_rows: int = 0
    empty_full: int = 0
    real: int = 0
    supervised: int = 0
    prompts: int = 0
    stops: int = 0
    cut_stops: int = 0
    endings: int = 0

    def after(self, step: Supervision) -> SupervisionTotals:
        """The sums with one more step."""
        empty, any_row = step.empty, bool((~step.empty).any())
        some = step.supervised > 0
        return SupervisionTotals(
            steps=self.steps + 1,
            empty_steps=self.empty_steps + (not any_row),
            empty_in_a_row=0 if any_row else self.empty_in_a_row + 1,
            rows=self.rows + len(step),
            empty_rows=self.empty_rows + int(empty.sum()),
            empty_full=self.empty_full + int((empty & step.full).sum()),
            real=self.real + int(step.real.sum()),
            supervised=self.supervised + int(step.supervised.sum()),
            prompts=self.prompts + int(((step.prompt > 1) & some).sum()),
            stops=self.stops + int(step.stops.sum()),
            cut_stops=self.cut_stops + int(step.cut_stops.sum()),
            endings=self.endings + int((some & ~step.full).sum()),
        )


@dataclass(frozen=True, eq=False)
class SupervisionFacts:
    """What was seen of the supervision.

    Attributes:
        supervision: Of the step being decided; None where it could not be seen.
        supervision_totals: Of all probed steps up to this one.
        stop_tokens: Tokens that may end an answer, as the tokenizer or the configuration says; the usual one first.
        has_tokenizer: The tokenizer says it.
        sample: The first rows of the first probed batch.
    """

    supervision: Supervision | None = None
    supervision_totals: SupervisionTotals = field(default_factory=SupervisionTotals)
    stop_tokens: tuple[int, ...] = ()
    has_tokenizer: bool = False
    sample: tuple[SampleRow, ...] = ()
