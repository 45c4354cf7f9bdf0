"""Which tensors are brought back again and again, and which of two checks says it."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT
from lora_probe_callbacks.facts import Bools, Facts, count

__all__ = ["begin_alike", "undone_slots"]

TWICE = 10  # one return to an earlier state is a rollback; see Path.undone


def undone_slots(facts: Facts) -> Bools:
    """Slots of which the way has been taken back twice in a row."""
    found: Bools = facts.intended & (facts.path.undone >= TWICE)
    return found


def begin_alike(facts: Facts, undone: Bools) -> bool:
    """Every step begins with the very values of the one before, in most of them: LP401 speaks of these."""
    return 2 * count(undone & (facts.history.put_back >= PERSISTENT - 1)) > count(undone)
