"""Words, signs and axes that the parts of the page share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_probe_callbacks.report.html import Html, tag

__all__ = ["COLUMNS", "GLYPHS", "WORDS", "WORST", "axis", "count"]

COLUMNS = 72  # more steps, or more layers, are drawn several to a cell

WORST = ("fail", "warn", "pass", "pending", "skipped")

GLYPHS = {"pass": "✓", "warn": "!", "fail": "✕", "pending": "…", "skipped": ""}

WORDS = {
    "pass": "passed",
    "warn": "warns",
    "fail": "fails",
    "pending": "too early to say",
    "skipped": "not judged",
}


def axis(labels: Sequence[str], most: int = 7) -> Html:
    """Labels below cells of equal width: the first, the last, and some between."""
    every = max(1, math.ceil((len(labels) - 1) / (most - 1)))
    shown = [i for i in range(0, len(labels), every) if i == 0 or len(labels) - 1 - i >= every / 2]
    if len(labels) > 1:
        shown.append(len(labels) - 1)
    spans = []
    for i in dict.fromkeys(shown):
        left, edge = (0.0, None) if i == 0 else (100 * (i + 0.5) / len(labels), None)
        if i == len(labels) - 1 and i:
            left, edge = 100.0, "edge"
        spans.append(tag("span", labels[i], class_=edge, style=f"left:{left:.4g}%"))
    return tag("div", *spans, class_="ticks num")


def count(number_: int, noun: str) -> str:
    return f"{number_} {noun}" if number_ == 1 else f"{number_} {noun}s"
