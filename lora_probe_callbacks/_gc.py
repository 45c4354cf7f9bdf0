"""Python's garbage collector, held off while facts are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["no_collection"]


@contextmanager
def no_collection() -> Iterator[None]:
    """Hold off the collector.

    A decision makes several objects for each tensor and lets as many go. In between, their number alone would set off
    collections, and every hundredth of them goes through everything that the process holds.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
