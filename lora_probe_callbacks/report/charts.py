"""Inline SVG that stretches with the page: heatmaps and lines. Labels are HTML, so that they keep their size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_probe_callbacks.report.html import Html, tag
from lora_probe_callbacks.report.runs import Cell

__all__ = ["PATTERNS", "Scale", "heatmap", "line", "number", "scale_bar"]

# viridis (van der Walt and Smith, 2015) in 12 steps: lightness rises evenly, also to colour-blind eyes.
_COLOURS = [
    "#440154",
    "#482173",
    "#433e85",
    "#38588c",
    "#2d708e",
    "#25858e",
    "#1e9b8a",
    "#2ab07f",
    "#52c569",
    "#86d549",
    "#c2df23",
    "#fde725",
]
_SIDE = 8  # a cell in the units of its SVG, before it is stretched
_SMALLEST = 0.04  # the part of the values that share the darkest colour: one tiny one must not take all contrast

# What a colour cannot say is drawn: one sign in each cell.
PATTERNS = tag(
    "svg",
    tag(
        "defs",
        *(
            tag(
                "pattern",
                tag("path", d=path, class_=f"sign {name}"),
                id=f"sign-{name}",
                width=_SIDE,
                height=_SIDE,
                patternUnits="userSpaceOnUse",
            )
            for name, path in (("none", "M1 7L7 1"), ("zero", "M2 4H6"), ("bad", "M1 1L7 7M1 7L7 1"))
        ),
    ),
    width=0,
    height=0,
    aria_hidden="true",
    class_="defs",
)


class Scale:
    """A logarithmic scale of colours.

    Args:
        values: What is to be shown; zero and what is no number are left out.
    """

    def __init__(self, values: Sequence[Cell]) -> None:
        positive = sorted(v for v in values if isinstance(v, float | int) and v > 0)
        self.high = positive[-1] if positive else 0.0
        self.low = positive[int(_SMALLEST * len(positive))] if positive else 0.0

    def level(self, value: float) -> int:
        """The index of a colour."""
        if value <= self.low or self.high == self.low:
            return len(_COLOURS) - 1 if value >= self.high else 0
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return min(len(_COLOURS) - 1, max(0, int(part * len(_COLOURS))))


def heatmap(rows: Sequence[Sequence[Cell]], scale: Scale, *, height: float, label: str) -> Html:
    """Rows of cells; a stretch of equal cells is one shape.

    Args:
        rows: Norms, ``"none"``, ``"non-finite"`` or None, as a record holds them; rows of equal length.
        scale: Shared with whatever it is compared to.
        height: Of one row, in pixels.
        label: What a screen reader says.

    Returns:
        The SVG.
    """
    paths: dict[str, list[str]] = {}
    for y, row in enumerate(rows):
        start = 0
        for x in range(1, len(row) + 1):
            if x < len(row) and _fill(row[x], scale) == _fill(row[start], scale):
                continue
            fill = _fill(row[start], scale)
            if fill is not None:
                width = (x - start) * _SIDE
                paths.setdefault(fill, []).append(f"M{start * _SIDE} {y * _SIDE}h{width}v{_SIDE}h-{width}z")
            start = x
    columns = max((len(row) for row in rows), default=1)
    return tag(
        "svg",
        *(tag("path", d="".join(d), fill=fill) for fill, d in sorted(paths.items())),
        class_="heat",
        viewBox=f"0 0 {columns * _SIDE} {len(rows) * _SIDE}",
        preserveAspectRatio="none",
        style=f"height:{height * len(rows):g}px",
        role="img",
        aria_label=label,
    )


def _fill(cell: Cell, scale: Scale) -> str | None:
    if cell is None:
        return None
    if isinstance(cell, str):
        return "url(#sign-none)" if cell == "none" else "url(#sign-bad)"
    return "url(#sign-zero)" if cell == 0 else _COLOURS[scale.level(cell)]


def scale_bar(scale: Scale) -> Html:
    """The legend of a heatmap.

    Args:
        scale: Its scale.

    Returns:
        The markup.
    """
    gradient = ",".join(
        f"{c} {100 * i / len(_COLOURS):.4g}% {100 * (i + 1) / len(_COLOURS):.4g}%" for i, c in enumerate(_COLOURS)
    )
    signs = (("zero", "exactly zero"), ("none", "no gradient"), ("bad", "inf or nan"))
    return tag(
        "div",
        tag("span", f"≤ {number(scale.low)}", class_="num"),
        tag("span", class_="bar", style=f"background:linear-gradient(90deg,{gradient})"),
        tag("span", number(scale.high), class_="num"),
        *(
            tag(
                "span",
                tag(
                    "svg",
                    tag("rect", width=_SIDE, height=_SIDE, fill=f"url(#sign-{name})"),
                    viewBox=f"0 0 {_SIDE} {_SIDE}",
                    class_="swatch",
                    aria_hidden="true",
                ),
                text,
                class_="key",
            )
            for name, text in signs
        ),
        class_="scale",
    )


def line(
    steps: Sequence[int],
    lines: Sequence[tuple[str, Sequence[float]]],
    *,
    band: tuple[Sequence[float], Sequence[float]] | None = None,
    height: int = 180,
    zero: bool = False,
    unit: bool = False,
    label: str,
) -> Html:
    """Values over steps, with an interval around them.

    Args:
        steps: Where the values are, rising.
        lines: (name, values); the name is its class: ``a``, ``b``, ``dots``.
        band: Lower and upper ends.
        height: In pixels.
        zero: Draw the line at 0, and let the axis include it.
        unit: A fraction: the axis goes from 0 to 1.
        label: What a screen reader says.

    Returns:
        The markup, with the numbers of its axes.
    """
    everything = [v for _, values in lines for v in values] + [v for end in band or () for v in end]
    low, high = min(everything), max(everything)
    if unit:
        low, high = min(low, 0.0), max(high, 1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    middle, half = (low + high) / 2, (high - low) / 2 or abs(high) / 10 or 1.0
    bottom, top = middle - 1.1 * half, middle + 1.1 * half
    span = max(1, steps[-1] - steps[0])

    def points(values: Sequence[float], at: Sequence[int] = steps) -> list[str]:
        return [
            f"{(1000 * (s - steps[0]) / span if len(steps) > 1 else 500):.5g} {100 * (top - v) / (top - bottom):.5g}"
            for s, v in zip(at, values, strict=True)
        ]

    shapes: list[Html] = []
    if zero and bottom < 0 < top:
        shapes.append(tag("path", d=f"M0 {100 * top / (top - bottom):.5g}H1000", class_="axis"))
    if band is not None:
        around = points(band[0]) + points(list(band[1])[::-1], list(steps)[::-1])
        shapes.append(tag("path", d="M" + "L".join(around) + "z", class_="band"))
    for name, values in lines:
        shapes.append(tag("path", d="M" + "L".join(points(values)), class_=f"line {name}"))
        if len(values) <= 60:
            shapes.append(tag("path", d="".join(f"M{p}h0" for p in points(values)), class_=f"dots {name}"))
    drawn = tag(
        "svg",
        *shapes,
        viewBox="0 0 1000 100",
        preserveAspectRatio="none",
        style=f"height:{height}px",
        role="img",
        aria_label=label,
        class_="plot",
    )
    ends = [tag("span", number(value)) for value in ((high, low) if high > low else (high,))]
    first, last = tag("span", f"step {steps[0]}"), tag("span", str(steps[-1]) if len(steps) > 1 else "")
    return tag(
        "div",
        tag("div", *ends, class_="y num"),
        drawn,
        tag("div", first, last, class_="x num"),
        class_="chart",
    )


def number(value: float) -> str:
    """A number as short as it can be read.

    Args:
        value: Any.

    Returns:
        For instance ``0.25`` or ``1.3e-05``.
    """
    return f"{value:.3g}"
