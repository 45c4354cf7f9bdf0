"""The catalogue: every check, found by being there."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache

from lora_probe_callbacks import checks
from lora_probe_callbacks.checks._base import Check, Verdict

__all__ = ["all_checks", "explain", "selected"]


@cache
def all_checks() -> tuple[Check, ...]:
    """Every check in this package, in the order of the codes.

    Returns:
        The checks.
    """
    found = []
    for info in pkgutil.walk_packages(checks.__path__, f"{checks.__name__}."):
        module = importlib.import_module(info.name)
        check = getattr(module, "CHECK", None)
        if isinstance(check, Check):
            found.append(check)
    return tuple(sorted(found, key=lambda check: check.code))


def selected(select: Iterable[str] | None = None, ignore: Iterable[str] = ()) -> tuple[Check, ...]:
    """The checks that codes or prefixes of codes choose, as in ruff.

    Args:
        select: Codes or prefixes, for instance ``("LP2", "LP303")``; None for all.
        ignore: Codes or prefixes to leave out.

    Returns:
        The checks chosen.

    Raises:
        ValueError: If a code or prefix matches no check.
    """
    codes = [check.code for check in all_checks()]
    for argument, prefixes in (("select", select or ()), ("ignore", ignore)):
        if isinstance(prefixes, str):
            raise ValueError(f"{argument} got the string {prefixes!r}, expected a sequence: [{prefixes!r}]")
        for prefix in prefixes:
            if not prefix.startswith("LP") or not any(code.startswith(prefix) for code in codes):
                raise ValueError(
                    f"{argument} got {prefix!r}, expected a code or a prefix of one, such as 'LP2' or "
                    f"'LP303'; `lora-probe checks` lists them"
                )
    return tuple(
        check
        for check in all_checks()
        if (select is None or check.code.startswith(tuple(select)))
        and not check.code.startswith(tuple(ignore) or ("-",))
    )


def explain(verdicts: dict[str, Verdict]) -> dict[str, Verdict]:
    """Leave out what a nearer cause explains.

    A verdict goes if every slot that it concerns is concerned by a nearer cause as well; one that is
    of no slot (of another adapter), if the nearer one names the same cause. What remains is the root
    cause, not its consequences.

    Args:
        verdicts: Code to verdict.

    Returns:
        Code to verdict, without the consequences.
    """
    bad = {code: v for code, v in verdicts.items() if v.status in ("fail", "warn")}
    if not bad:
        return verdicts
    checks_by_code = {check.code: check for check in all_checks()}
    kept = dict(verdicts)
    for code, verdict in bad.items():
        nearer: frozenset[int] = frozenset()
        names = []
        for other in checks_by_code[code].explained_by:
            if other not in bad:
                continue
            same = not verdict.slots and verdict.cause and verdict.cause == bad[other].cause
            if same or bad[other].slots & verdict.slots:
                nearer |= bad[other].slots
                names.append(other)
        if names and verdict.slots <= nearer:
            kept[code] = Verdict("skipped", f"explained by {', '.join(names)}")
    return kept
