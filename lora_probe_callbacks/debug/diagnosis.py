"""A diagnosis of the isolated debugger, for people and for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_probe_callbacks.debug.results import SCHEMA, Diagnosis
from lora_probe_callbacks.report.record import plain

__all__ = ["as_json", "rendered"]

_MOST = 4  # tensors shown, unless all are asked for
_STYLE: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "title_justify": "left", "title_style": "bold"}


def as_json(diagnosis: Diagnosis) -> dict[str, object]:
    """One object with all that was found, and the version of its form.

    Args:
        diagnosis: From the debugger.

    Returns:
        Plain values; numbers that are not finite are null.
    """
    healthy = diagnosis.healthy
    return {"schema": SCHEMA, "command": "debug", "healthy": healthy, **plain(dataclasses.asdict(diagnosis))}


def rendered(diagnosis: Diagnosis, *, per_layer: bool = False) -> RenderableType:
    """All of it, for a terminal.

    Args:
        diagnosis: From the debugger.
        per_layer: Show the gradient of every tensor.

    Returns:
        Something that rich can print.
    """
    head = (
        f"{diagnosis.tensors} adapter tensors in {diagnosis.layers} layers, on {diagnosis.device} in {diagnosis.dtype}"
    )
    parts: list[RenderableType] = [
        Text(head),
        Text(_on_off(diagnosis)),
        Text(""),
        _variants(diagnosis),
        *_reasons([(v.variant, v.backward) for v in diagnosis.variants]),
        Text(""),
        _gradients(diagnosis, per_layer=per_layer),
        Text(""),
        _projections(diagnosis),
        *_reasons([(p.backend, p.why_not) for p in diagnosis.projections]),
        Text(""),
        *(Text(f"Not judged: {note}") for note in diagnosis.notes),
        *(Text(f"Wrong: {problem}", "bold red") for problem in diagnosis.problems),
        Text(diagnosis.conclusion, "green" if diagnosis.healthy else "red"),
    ]
    return Group(*parts)


def _on_off(diagnosis: Diagnosis) -> str:
    found = diagnosis.on_off
    delta = f"switching the adapter on changes a logit by {found.delta:.3g} at most"
    if found.verdict == "b-is-zero":
        return f"{delta}: active, but B is still zero (B nudged by 0.01: {found.delta_nudged:.3g})"
    if found.verdict == "inactive":
        return f"{delta}: inactive (B nudged by 0.01: {found.delta_nudged:.3g} as well)"
    return f"{delta}: {'not finite' if found.verdict == 'not-finite' else 'active'}"


def _variants(diagnosis: Diagnosis) -> Table:
    table = Table(title="Gradients that S gives the adapter tensors", **_STYLE)
    table.add_column("variant", no_wrap=True)
    for title in ("S grad", "none", "zero", "non-zero", "inf/nan"):
        table.add_column(title, justify="right", no_wrap=True)
    for v in diagnosis.variants:
        counts = (str(v.count(state)) for state in ("none", "zero", "non-zero", "not-finite"))
        table.add_row(f"{v.variant}  {v.what}", "yes" if v.requires_grad else "no", *counts)
    return table


def _gradients(diagnosis: Diagnosis, *, per_layer: bool) -> Table:
    """The norms of each tensor in every variant; the largest of A, or all."""
    table = Table(title="Gradient norms" if per_layer else "Largest gradient norms", **_STYLE)
    table.add_column("tensor", overflow="fold")
    for v in diagnosis.variants:
        table.add_column(v.variant, justify="right")
    rows = list(zip(*(v.gradients for v in diagnosis.variants), strict=True))
    if not per_layer:
        rows = sorted(rows, key=lambda row: -(row[0].norm or 0.0))[:_MOST]
    for row in rows:
        table.add_row(Text(row[0].name), *(g.state if g.norm is None else f"{g.norm:.3g}" for g in row))
    return table


def _projections(diagnosis: Diagnosis) -> Table:
    table = Table(title="Projections s_n, one for each prompt", **_STYLE)
    table.add_column("backend")
    table.add_column("s_n", overflow="fold")
    table.add_column("error to the loop", justify="right")
    for p in diagnosis.projections:
        if p.s is None:
            table.add_row(p.backend, "cannot run", "")
            continue
        values = ", ".join(f"{value:+.3g}" for value in p.s[:4]) + (", ..." if len(p.s) > 4 else "")
        table.add_row(
            p.backend, values, "" if p.error_to_loop is None or p.backend == "loop" else f"{p.error_to_loop:.2g}"
        )
    return table


def _reasons(pairs: Sequence[tuple[str, str | None]]) -> list[Text]:
    """Each reason once, with those it holds for."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in pairs:
        if reason is not None:
            by_reason.setdefault(reason, []).append(name)
    return [Text(f"{', '.join(names)}: {reason}", "dim") for reason, names in by_reason.items()]
