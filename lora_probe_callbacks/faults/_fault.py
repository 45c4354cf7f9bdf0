"""What a fault is, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    pass

__all__ = ["FAULTS", "Fault", "fault"]


P = ParamSpec("P")


R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, for a program that goes through all of them.

    Attributes:
        name: Name of the function in this module.
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


FAULTS: dict[str, Fault] = {}
"""Name to fault, in the order of the entries."""


def fault(entry: str, code: str, *threads: str, by_step: int = 0) -> Callable[[Callable[P, R]], Callable[P, R]]:
    def enter(inject: Callable[P, R]) -> Callable[P, R]:
        name = getattr(inject, "__name__", entry)
        FAULTS[name] = Fault(name, entry, code, by_step, threads, inject)
        return inject

    return enter
