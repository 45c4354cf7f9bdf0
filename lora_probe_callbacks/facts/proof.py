"""What a report says of one claim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["CLAIMS", "Claim", "Proof"]

# In the order of the way that a gradient takes; the later ones apply only where there are ranks, files and the like.
Claim = Literal["supervised", "active", "reached", "gradient", "owned", "moved", "seen", "agreed", "saved", "served"]
CLAIMS: tuple[Claim, ...] = get_args(Claim)


@dataclass(frozen=True, slots=True)
class Proof:
    """For how many of the intended tensors one claim has been proven.

    Attributes:
        claim: What is claimed, one of ``CLAIMS``.
        proven: Number of tensors for which it was observed, and has been renewed since as the others were.
        expected: Number of tensors for which it should be.
        idle: Number of tensors that are not counted, since their layer has run in no forward so far.
        step: The last step at which it was observed, None if it never was.
        missing: Names of the tensors for which it is not proven.
        why: What is known of the reason, empty where nothing is missing.
        detail: What it was proven by, where that is worth a word.
        sampled: It is measured a part at a time, and rarely: what is missing does not keep a run from being healthy.
    """

    claim: Claim
    proven: int
    expected: int
    idle: int = 0
    step: int | None = None
    missing: tuple[str, ...] = ()
    why: str = ""
    detail: str = ""
    sampled: bool = False

    @property
    def complete(self) -> bool:
        """Proven for every tensor for which it should be, of which there is one at least."""
        return 0 < self.expected <= self.proven
