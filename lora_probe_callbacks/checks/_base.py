"""What a check is, and the words that its verdict is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from lora_probe_callbacks.facts import Bools, Facts, indices

__all__ = [
    "PERSISTENT",
    "Check",
    "Need",
    "Status",
    "Verdict",
    "absent",
    "fail",
    "ok",
    "pending",
    "skipped",
    "some",
    "warn",
    "worst",
]

Status = Literal["pass", "warn", "fail", "pending", "skipped"]

# "Zero", "unchanged" and "rate 0" are judged over time: a batch without a signal, a warm-up that
# begins at 0 and a first overflow are healthy once. Four probed steps in a row are not chance.
PERSISTENT = 4

FAMILIES = {
    "0": "supervision",
    "1": "activation",
    "2": "identity",
    "3": "reachability",
    "4": "update",
    "5": "values",
    "6": "coverage",
    "7": "ranks",
    "8": "checkpoints",
    "9": "estimator",
    "81": "serving",  # beside the checkpoints
}


# What a check cannot do without. Where the run cannot have it, the check is skipped with the reason; what only such
# checks need is not observed when none of them was asked for.
Need = Literal[
    "owned",  # the tensors that the optimizer owns, their gradients and their updates
    "initial state",  # the values in which training starts
    "coverage",  # what PEFT's configuration asks for, and what it has made
    "replay",  # the training forward, run again
    "finite difference",  # the loss at slightly other weights
    "files",  # a saved file
    "supervision",  # the gradients of the last hidden states
    "resume",  # a saved state that this run goes on from
    "ranks",  # what the other ranks have sent
    "serving",  # another model that should hold the adapter
]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check says of one set of facts.

    Attributes:
        status: ``pass``, ``warn``, ``fail``, ``pending`` (too early) or ``skipped`` (cannot be judged).
        message: What is wrong, in one line that stands alone; or the reason for pending and skipped.
        evidence: What was got and what was expected.
        slots: The slots concerned; a finding whose slots are all explained by a nearer cause is
            not reported a second time.
        cause: Tells apart findings of one check that have different causes.
        fix: Replaces the check's general advice where the facts allow better.
        of_update: The verdict is about the last update, not about the step being decided.
        seen: Step and framework step in which it was observed, if that is neither.
        nothing_new: There was nothing to look at: a reason that was given before says more.
    """

    status: Status
    message: str = ""
    evidence: dict[str, object] = field(default_factory=dict)
    slots: frozenset[int] = frozenset()
    cause: str = ""
    fix: str = ""
    of_update: bool = False
    seen: tuple[int, int] | None = None
    nothing_new: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One rule of the catalogue.

    Attributes:
        code: Stable code; its first digit is the family.
        name: Readable name.
        what: What the check looks at and when it reports.
        why: Why the fault is silent without it.
        fix: What to do.
        quiet: Healthy look-alikes on which it stays quiet, and what it cannot see.
        threads: Public reports of the fault.
        explained_by: Codes of nearer causes: where one of them reports the same slots, this is silent.
        judge: The verdict on a set of facts.
        needs: What it cannot do without.
        early: It is judged when training starts already, where a framework tells of that, if nothing of the adapter is
            owned at all: what may still change before the first forward does not mend that.
        sets_ranks_apart: A mere warning of it on one rank explains that the ranks differ.
    """

    code: str
    name: str
    what: str
    why: str
    fix: str
    quiet: str
    judge: Callable[[Facts], Verdict]
    threads: tuple[str, ...] = ()
    explained_by: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    early: bool = False
    sets_ranks_apart: bool = False

    @property
    def family(self) -> str:
        """Name of the family that the code's first digits stand for."""
        return FAMILIES.get(self.code[2:4]) or FAMILIES[self.code[2]]


@lru_cache
def _plain(status: Status, reason: str = "", *, nothing_new: bool = False) -> Verdict:
    """One object for all that say the same: some fifty do at every decision."""
    return Verdict(status, reason, nothing_new=nothing_new)


def ok() -> Verdict:
    """Judged and found healthy."""
    return _plain("pass")


def pending(reason: str) -> Verdict:
    """Too early to say, and why."""
    return _plain("pending", reason)


def absent(reason: str) -> Verdict:
    """There was nothing to look at so far, and why; when the run has ended the check did not apply."""
    return _plain("pending", reason, nothing_new=True)


def skipped(reason: str) -> Verdict:
    """Could not be judged, and why."""
    return _plain("skipped", reason)


def fail(
    message: str,
    slots: Bools | Iterable[int] = (),
    *,
    got: str,
    expected: str,
    cause: str = "",
    fix: str = "",
    of_update: bool = False,
) -> Verdict:
    """Certainly wrong."""
    return Verdict(
        "fail", message, {"got": got, "expected": expected}, frozenset(indices(slots)), cause, fix, of_update
    )


def warn(
    message: str,
    slots: Bools | Iterable[int] = (),
    *,
    got: str,
    expected: str,
    fix: str,
    cause: str = "",
    of_update: bool = False,
) -> Verdict:
    """Probably wrong; the fix says what would settle it."""
    return Verdict(
        "warn", message, {"got": got, "expected": expected}, frozenset(indices(slots)), cause, fix, of_update
    )


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The first verdict that finds something wrong; else the first that could judge.

    Args:
        verdicts: At least one, each on another thing of the same kind.

    Returns:
        One of them.
    """
    order: tuple[Status, ...] = ("fail", "warn", "pass", "pending", "skipped")
    return min(verdicts, key=lambda v: order.index(v.status))
