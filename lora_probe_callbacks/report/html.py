"""HTML in which everything is escaped that was not made here."""

from __future__ import annotations

import html
from collections.abc import Iterable

__all__ = ["Html", "join", "tag"]

_VOID = {"meta", "br"}


class Html(str):
    """Text that is markup already; any other string is escaped where it is used."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: object) -> Html:
    """One element.

    Args:
        name: Its name.
        *children: Markup, or text, which is escaped.
        **attributes: Values are escaped; None leaves an attribute out. A trailing underscore is dropped
            (``class_``), others become hyphens.

    Returns:
        The markup.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Markup and text, which is escaped, one after the other.

    Args:
        parts: The pieces.

    Returns:
        The markup.
    """
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))
