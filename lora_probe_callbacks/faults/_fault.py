"""What a fault is, and how a function becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

__all__ = ["Fault", "fault", "found"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, for a program that goes through all of them.

    Attributes:
        name: Name of the function.
        entry: The public fault that it reproduces, as the test suite counts them.
        code: Code of the check that finds it.
        by_step: The last step, counted from the one in which it takes effect, at which it is found;
            above 0 where one step proves nothing (a gradient of zero, a part without a gradient).
        threads: Public reports, as ``owner/repository#number``.
        inject: The function.
    """

    name: str
    entry: str
    code: str
    by_step: int
    threads: tuple[str, ...]
    inject: Callable[..., Any]


found: list[Fault] = []  # as the modules of this package are imported


def fault(entry: str, code: str, *threads: str, by_step: int = 0) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Enter a function into the table of faults; the arguments are the attributes of :class:`Fault`."""

    def enter(inject: Callable[P, R]) -> Callable[P, R]:
        name = getattr(inject, "__name__", entry)
        found.append(Fault(name, entry, code, by_step, threads, inject))
        return inject

    return enter
