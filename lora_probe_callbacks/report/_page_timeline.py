"""The timeline: one strip for each check."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_probe_callbacks.report._page_words import COLUMNS, GLYPHS, WORDS, WORST, axis
from lora_probe_callbacks.report.html import Html, join, tag
from lora_probe_callbacks.report.runs import Run

__all__ = ["timeline"]


@dataclass(frozen=True, slots=True)
class _Column:
    """Decisions that share a column of the timeline."""

    label: str
    statuses: Mapping[str, tuple[str, str]]  # code -> status and message


def timeline(run: Run) -> Html:
    """A strip for each check, by family, with the legend and the steps."""
    columns = _columns(run)
    if not columns:
        return tag("p", "No decision was recorded.", class_="empty")
    legend = tag(
        "div",
        *(
            tag("span", tag("span", GLYPHS[status], class_=f"seg {status}"), WORDS[status], class_="key")
            for status in WORST
        ),
        class_="legend",
    )
    known = {check["code"]: check for check in run.start.get("checks", ())}
    codes = sorted({code for column in columns for code in column.statuses})
    strips: list[Html] = []
    for family, members in itertools.groupby(codes, key=lambda code: known.get(code, {}).get("family", "")):
        strips.append(tag("h3", family, class_="family"))
        strips += [_strip(code, known.get(code, {}), columns) for code in members]
    return join(
        (
            tag("p", "One strip for each check, from the start of the run to its end.", class_="about"),
            legend,
            tag("div", *strips, _ticks(columns), class_="strips"),
        )
    )


def _columns(run: Run) -> list[_Column]:
    """What each decision said; a verdict on an update stands at the step that made it."""
    at: dict[int, int] = {}
    labels, cells = [], []
    for index, decision in enumerate(run.decisions):
        if decision.moment in ("step", "skipped"):
            at[decision.step] = index
        labels.append(str(decision.step) if decision.moment in ("step", "skipped") else decision.moment)
        cells.append({code: (v["status"], v.get("message", "")) for code, v in decision.verdicts.items()})
    for index, decision in enumerate(run.decisions):
        place = at.get(-1 if decision.update_step is None else decision.update_step)
        for code, verdict in decision.verdicts.items():
            if verdict.get("of_update") and place is not None and place < index:
                cells[place][code] = cells[index].pop(code)
    if labels and labels[-1] == "end" and not any(status in ("fail", "warn") for status, _ in cells[-1].values()):
        del cells[-1], labels[-1]  # nothing more was seen; what the last update left open stands at its step
    size = math.ceil(len(cells) / COLUMNS) or 1
    columns = []
    for start in range(0, len(cells), size):
        together = cells[start : start + size]
        codes = dict.fromkeys(code for cell in together for code in cell)
        worst = {
            code: min((cell[code] for cell in together if code in cell), key=lambda s: WORST.index(s[0]))
            for code in codes
        }
        columns.append(_Column(labels[start], worst))
    return columns


def _strip(code: str, check: Mapping[str, Any], columns: Sequence[_Column]) -> Html:
    cells = [column.statuses.get(code, ("skipped", "not judged")) for column in columns]
    segments, start = [], 0
    for status, group in itertools.groupby(cells, key=lambda cell: cell[0]):
        members = list(group)
        end = start + len(members)
        first, last = columns[start].label, columns[end - 1].label
        where = f"step {first}" if first == last else f"step {first} to {last}"
        said = f"{where}: {WORDS[status]}" + (f" ({members[-1][1]})" if members[-1][1] else "")
        segments.append(
            tag(
                "span",
                tag("span", GLYPHS[status], aria_hidden="true"),
                tag("span", said, class_="sr"),
                class_=f"seg {status}",
                title=said,
                style=f"grid-column:{start + 1}/{end + 1}",
            )
        )
        start = end
    statuses = {cell[0] for cell in cells}
    worst = min(statuses, key=WORST.index)
    state = {"fail": " is-fail", "warn": " is-warn", "pending": " idle", "skipped": " idle"}.get(worst, "")
    return tag(
        "div",
        tag("div", tag("span", code, class_="code"), str(check.get("name", "")), class_="who", title=check.get("what")),
        tag("div", *segments, class_="bars", style=f"grid-template-columns:repeat({len(columns)},minmax(0,1fr))"),
        class_=f"strip{state}",
    )


def _ticks(columns: Sequence[_Column]) -> Html:
    return tag(
        "div", tag("div", class_="who"), axis([c.label for c in columns]), class_="strip axis", aria_hidden="true"
    )
