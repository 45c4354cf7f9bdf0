"""What keeps a comparison from being made."""

from __future__ import annotations

__all__ = ["CannotCompareError"]


class CannotCompareError(Exception):
    """Something cannot be scored or loaded; the message says in one line what was got and what was expected."""
