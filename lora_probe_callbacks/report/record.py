"""The record: append-only JSON lines, one for each decision, readable after a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["SCHEMA", "Record", "read_record"]

SCHEMA = 1


class Record:
    """Appends lines to a file, each flushed when it is complete.

    Args:
        path: The file; folders are made, an existing file is continued.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, kind: str, **content: object) -> None:
        """Append one line.

        Args:
            kind: What the line is: ``start``, ``decision``, ``error`` or ``end``.
            **content: What it says; values that are not finite become null.
        """
        line = json.dumps(_plain({"schema": SCHEMA, "kind": kind, **content}), allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_record(path: str | Path) -> Iterator[dict[str, Any]]:
    """Read the lines of a record; a half line at the end is passed over.

    Args:
        path: The file.

    Yields:
        One mapping for each line.
    """
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    return str(value)
