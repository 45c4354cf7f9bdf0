"""Errors of the probe's own: training goes on, the user is told once, and nothing is called healthy any more."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

__all__ = ["Errors", "Scope"]

# What is given up when something fails: everything, or one part of the work.
Scope = Literal["probe", "files", "initial look", "record", "check"]


class Errors:
    """Catches what goes wrong in the probe itself.

    Args:
        tell: Called with one line for the user and the traceback, for each error once.
    """

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        self.tracebacks: list[str] = []
        self._tell = tell
        self._give_up: dict[Scope, Callable[[BaseException], None]] = {}

    def on(self, scope: Scope, give_up: Callable[[BaseException], None]) -> None:
        """Say what ends when work of a scope has failed.

        Args:
            scope: The scope.
            give_up: Called with the error, after it was told.
        """
        self._give_up[scope] = give_up

    @contextmanager
    def contain(self, scope: Scope = "probe") -> Iterator[None]:
        """Do work of the probe's own; no exception of it leaves this block.

        Args:
            scope: What is given up if it fails.
        """
        try:
            yield
        except Exception as error:
            self.report(error, scope)

    def report(self, error: BaseException, scope: Scope = "probe") -> None:
        """Tell of an error that was caught elsewhere, and give up what it belongs to.

        Args:
            error: The error.
            scope: What is given up.
        """
        text = "".join(traceback.format_exception(error))
        if text not in self.tracebacks:
            self.tracebacks.append(text)
            what = "the record ends here" if scope == "record" else "could not judge"
            self._tell(f"{what}, training goes on: {type(error).__name__}: {error}", text)
        if scope in self._give_up:
            self._give_up[scope](error)
