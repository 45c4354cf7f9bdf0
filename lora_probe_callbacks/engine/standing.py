"""A verdict stands while everything that it was judged on stands.

Checks are pure, and most facts of a healthy run are the same at every decision, mostly the same objects. So each
check is asked once with facts that take note of what it reads, and asked again only when some of that has changed.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from typing import Any

from lora_probe_callbacks.checks._base import Check, Verdict
from lora_probe_callbacks.facts import Facts

__all__ = ["Standing"]

_FIELDS = frozenset(field.name for field in fields(Facts))
_LONGEST = 64  # decisions that a check is asked at directly, once its verdicts have fallen again and again


class _Noting(Facts):
    """A copy of the facts that takes note of the fields that are read."""

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name in _FIELDS:
            notes = object.__getattribute__(self, "__dict__").get("notes")
            if notes is not None:  # dataclasses.replace() has read all of them and made a new one
                notes.add(name)
        return value


@dataclass(slots=True)
class _Known:
    """What is known of one check."""

    standing: Verdict | None = None  # its last one
    fields: AbstractSet[str] = frozenset()  # of the facts, that this was judged on
    directly: int = 0  # decisions at which it is still asked without notes, which take longer
    pause: int = 1  # how many these will be the next time


class Standing:
    """The verdicts of one run that still stand."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._facts: Facts | None = None  # on which all that stands would be the same

    def judge(self, check: Check, facts: Facts) -> Verdict:
        """The verdict of a check.

        Args:
            check: The check.
            facts: What to judge.

        Returns:
            The very object of the last time, where nothing has changed that it was judged on.
        """
        if facts is not self._facts:
            self._turn_to(facts)
        known = self._known.setdefault(check.code, _Known())
        if known.standing is not None:
            return known.standing
        if known.directly:
            known.directly -= 1
            return check.judge(facts)
        noting = object.__new__(_Noting)
        noting.__dict__.update({name: getattr(facts, name) for name in _FIELDS}, notes=set())
        known.standing = check.judge(noting)
        known.fields = noting.__dict__["notes"]
        return known.standing

    def _turn_to(self, facts: Facts) -> None:
        """Let the verdicts fall that were judged on something else."""
        then, now = vars(self._facts or facts), vars(facts)
        changed = {name for name in _FIELDS if now[name] is not then[name] and now[name] != then[name]}
        for known in self._known.values():
            if known.standing is not None and not known.fields.isdisjoint(changed):
                known.standing, known.directly, known.pause = None, known.pause, min(2 * known.pause, _LONGEST)
        self._facts = facts
