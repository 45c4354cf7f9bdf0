"""What the checks on saved files share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from lora_probe_callbacks.checks._base import Verdict, pending, skipped, worst
from lora_probe_callbacks.facts import Facts, SavedFact

__all__ = ["each_save"]


def each_save(facts: Facts, judge: Callable[[SavedFact], Verdict | None]) -> Verdict:
    """The first saved file that something is wrong with; else the first that could be judged.

    Args:
        facts: What is known.
        judge: The verdict on one file, None where it has nothing to say of it.

    Returns:
        A verdict.
    """
    if not facts.saves:
        return pending("nothing was saved yet")
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
