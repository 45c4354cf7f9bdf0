"""The heatmaps of gradients and updates, layers by steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from lora_probe_callbacks.report._page_words import COLUMNS, axis
from lora_probe_callbacks.report.charts import Scale, heatmap, number, scale_bar
from lora_probe_callbacks.report.html import Html, join, tag
from lora_probe_callbacks.report.runs import Cell, Decision, Run, Tensor

__all__ = ["maps"]

_ROWS = 84

_ABOUT = {
    "gradients": "Euclidean norm of every adapter gradient, as it was read at the step. While B is still zero, every "
    "gradient of A is exactly zero: that is how LoRA starts.",
    "updates": "Euclidean norm of what each step changed in every adapter tensor.",
}


def maps(run: Run, what: str) -> Html:
    """Heatmaps of the ``gradients`` or the ``updates``, of A beside B, and their numbers."""
    read: Callable[[Decision], tuple[int | None, Mapping[Tensor, Cell]]] = (
        (lambda d: (d.step, d.gradients)) if what == "gradients" else (lambda d: (d.update_step, d.updates))
    )
    by_step: dict[int, dict[Tensor, Cell]] = {}
    for decision in run.decisions:
        step, values = read(decision)
        seen = {tensor: cell for tensor, cell in values.items() if cell is not None}
        if step is not None and seen:
            by_step.setdefault(step, {}).update(seen)
    if not by_step:
        return tag("p", f"No {what} were recorded.", class_="empty")
    steps = sorted(by_step)
    tensors = list(dict.fromkeys(tensor for values in by_step.values() for tensor in values))
    tables: dict[str, dict[tuple[str, str], list[Cell]]] = {}
    for role in ("A", "B", "other"):
        for tensor in tensors:
            if tensor.role == role:
                row = [by_step[step].get(tensor) for step in steps]
                rows = tables.setdefault(role, {})
                key = (tensor.layer, tensor.adapter)
                rows[key] = [_together(pair) for pair in zip(rows[key], row, strict=True)] if key in rows else row
    pieces: list[str] = [tag("p", _ABOUT[what], class_="about")]
    paired = [tables[role] for role in ("A", "B") if role in tables]
    if paired:
        pieces.append(_map_group(steps, {role: tables[role] for role in ("A", "B") if role in tables}, what))
    if "other" in tables:
        pieces.append(_map_group(steps, {"other tensors": tables["other"]}, what))
    pieces.append(_numbers(steps, tables, what))
    return join(pieces)


def _map_group(steps: Sequence[int], tables: Mapping[str, Mapping[tuple[str, str], list[Cell]]], what: str) -> Html:
    """Heatmaps side by side, with one scale and the same rows."""
    keys = list(dict.fromkeys(key for table in tables.values() for key in table))
    per_row, per_column = math.ceil(len(keys) / _ROWS), math.ceil(len(steps) / COLUMNS)
    blank: list[Cell] = [None] * len(steps)
    drawn = {
        role: [
            [
                _together([c for row in rows for c in row[x : x + per_column]], mean_of=per_column)
                for x in range(0, len(steps), per_column)
            ]
            for y in range(0, len(keys), per_row)
            for rows in [[table.get(key, blank) for key in keys[y : y + per_row]]]
        ]
        for role, table in tables.items()
    }
    scale = Scale([cell for rows in drawn.values() for row in rows for cell in row])
    names = _short_names(keys)[::per_row]
    height = max(5.0, min(18.0, 560 / len(names)))
    every = math.ceil(11 / height)
    labels = [
        tag("div", name, title=keys[i * per_row][0], style=f"height:{every * height:g}px;line-height:{height:g}px")
        for i, name in enumerate(names)
        if i % every == 0
    ]
    ticks = axis([str(step) for step in steps[::per_column]], most=4)
    maps = [
        tag(
            "div",
            tag("h3", role),
            heatmap(rows, scale, height=height, label=f"{what} of {role}: layers by steps"),
            ticks,
        )
        for role, rows in drawn.items()
    ]
    notes = []
    if per_row > 1:
        notes.append(f"each row joins {per_row} layers (norm over all of them)")
    if per_column > 1:
        notes.append(f"each column joins {per_column} probed steps (root mean square)")
    return join(
        (
            scale_bar(scale),
            tag("p", f"{'; '.join(notes).capitalize()}.", class_="about") if notes else Html(),
            tag(
                "div",
                tag("div", tag("h3", Html("&nbsp;")), *labels, class_="names num"),
                *maps,
                class_="maps one" if len(maps) == 1 else "maps",
            ),
        )
    )


def _together(cells: Sequence[Cell], mean_of: int = 1) -> Cell:
    """One value for several tensors (the norm of all) and several steps (the mean square)."""
    found = [cell for cell in cells if cell is not None]
    if not found:
        return None
    if "non-finite" in found:
        return "non-finite"
    norms = [cell for cell in found if isinstance(cell, float | int)]
    if not norms:
        return "none"
    return math.sqrt(sum(norm * norm for norm in norms) / mean_of)


def _short_names(keys: Sequence[tuple[str, str]]) -> list[str]:
    """Names of layers without what all have in common; first and last part where that is enough."""
    several = len({adapter for _, adapter in keys}) > 1
    parts = [layer.split(".") for layer, _ in keys]
    common = 0
    while len(keys) > 1 and all(len(p) > common + 1 for p in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    left = [p[common:] for p in parts]
    brief = [f"{p[0]} {p[-1]}" if len(p) > 1 else p[0] for p in left]
    names = brief if len(set(brief)) >= len({tuple(p) for p in left}) else [".".join(p) for p in left]
    return [f"{name} [{adapter}]" if several else name for name, (_, adapter) in zip(names, keys, strict=True)]


def _numbers(steps: Sequence[int], tables: Mapping[str, Mapping[tuple[str, str], list[Cell]]], what: str) -> Html:
    rows = [
        tag(
            "tr",
            tag("td", layer),
            tag("td", role),
            *(tag("td", _cell(cell), class_="num") for cell in (row[0], row[-1], _largest(row))),
        )
        for role, table in tables.items()
        for (layer, _), row in table.items()
    ]
    titles = ("layer", "tensor", f"step {steps[0]}", f"step {steps[-1]}", "largest")
    head = tag("thead", tag("tr", *(tag("th", t, class_="num" if i > 1 else None) for i, t in enumerate(titles))))
    table = tag("table", head, tag("tbody", *rows))
    return tag("details", tag("summary", f"The {what} in numbers"), tag("div", table, class_="scroll"))


def _cell(cell: Cell) -> str:
    if cell is None:
        return "not read"
    return cell if isinstance(cell, str) else number(cell)


def _largest(row: Sequence[Cell]) -> Cell:
    return max((cell for cell in row if isinstance(cell, float | int)), default=None)
