"""What the checks on saved files share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from lora_probe_callbacks.checks._base import Verdict, absent, skipped, worst
from lora_probe_callbacks.facts import Facts, SavedFact

__all__ = ["Values", "each_save", "values_of"]

Values = Literal["equal", "untrained", "start", "previous", "partly", "unrelated", "fresh", "related", "not finite"]

_UNRELATED = 0.5  # cosine between the A of one run at two times is near 1; of two initialisations near 0
# A file that is older than the last step has other values than the live ones, but not such.
_WRONG_AT_ANY_TIME = ("not finite", "partly", "unrelated", "untrained")


def each_save(facts: Facts, judge: Callable[[SavedFact], Verdict | None]) -> Verdict:
    """The first saved file that something is wrong with; else the first that could be judged.

    Args:
        facts: What is known.
        judge: The verdict on one file, None where it has nothing to say of it.

    Returns:
        A verdict.
    """
    if not facts.saves:
        return absent("nothing was saved yet")
    verdicts = []
    for save in facts.saves:
        verdict = None
        if save.unreadable is None and save.why_not is None:
            verdict = judge(save)
        if verdict is None:
            why = f"it cannot be read: {save.unreadable}" if save.unreadable else save.why_not
            verdict = skipped(f"{save.path}: {why or 'nothing of this kind is in it'}")
        verdicts.append(dataclasses.replace(verdict, seen=(save.step, save.framework_step)))
    return worst(verdicts)


def values_of(save: SavedFact) -> Values | None:
    """Whose the values in a file are.

    Args:
        save: The file, as it was compared with the live adapter.

    Returns:
        ``"equal"`` the live ones; ``"untrained"`` every B is zero, after training; ``"partly"`` some tensors are right,
        others not; ``"start"`` those of when training began; ``"previous"`` those of the file before, though the
        adapter has moved; ``"unrelated"`` they have nothing in common with the live ones; ``"fresh"`` the live
        adapter was never trained, and the file's was; ``"related"`` they point the same way, as an average over
        steps does; ``"not finite"``; or None where that cannot be told.
    """
    if not save.compared or (save.differing and save.other is not None):
        return None
    if not save.differing:
        return "equal" if save.as_live else "untrained"
    values = _differing(save)
    return values if save.why_no_values is None or values in _WRONG_AT_ANY_TIME else None


def _differing(save: SavedFact) -> Values:
    if save.not_finite:
        return "not finite"
    if save.live_zero_b and not save.b_moved:
        return "fresh"
    if save.zero_b:
        return "untrained"
    if _right_in_part(save):
        return "partly"
    if save.like_start:
        return "start"
    if save.cosine < _UNRELATED:
        return "unrelated"
    return "previous" if save.like_previous else "related"


def _right_in_part(save: SavedFact) -> bool:
    """A quarter of the tensors that have moved is right: no average, and no other time, does that."""
    if save.moved:
        return 4 * save.moved_right >= save.moved
    return len(save.differing) < save.compared
