"""The health table, and findings as they happen."""

from __future__ import annotations

import io

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_probe_callbacks.report.findings import Finding, ProbeReport

__all__ = ["finding_panel", "health_table", "render"]

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "pending": "cyan", "skipped": "dim"}
_TITLES = {
    True: ("healthy", "bold green"),
    False: ("UNHEALTHY", "bold red"),
    None: ("could not judge", "bold yellow"),
}


def health_table(report: ProbeReport) -> RenderableType:
    """Everything that was judged, and everything that was not and why.

    Args:
        report: A report.

    Returns:
        Something that rich can print.
    """
    word, style = _TITLES[report.healthy]
    counts = ", ".join(
        f"{len(found)} {status}"
        for status in ("fail", "warn", "pass", "pending", "skipped")
        if (found := report.with_status(status))
    )
    parts: list[RenderableType] = [Text.assemble("LoRA probe: ", (word, style), f"  ({counts})")]
    parts += [Padding(finding_panel(f), (0, 0, 0, 2)) for f in report.with_status("fail", "warn")]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for title in ("code", "check", "verdict", "judged up to step, or why not"):
        table.add_column(title, overflow="fold")
    for finding in report.with_status("pass", "pending", "skipped"):
        detail = f"step {finding.last_step}" if finding.status == "pass" else finding.message
        table.add_row(finding.code, finding.name, Text(finding.status, _STYLES[finding.status]), Text(detail))
    parts.append(Padding(table, (0, 0, 0, 2)))
    return Group(*parts)


def finding_panel(finding: Finding) -> RenderableType:
    """One finding: what is wrong, the evidence, the fix.

    Args:
        finding: A finding.

    Returns:
        Something that rich can print.
    """
    head = Text.assemble(
        (f"{finding.code} {finding.name}", _STYLES[finding.status]),
        f"  {finding.status} at step {finding.step}",
        f" (framework step {finding.framework_step})" if finding.framework_step != finding.step else "",
    )
    grid = Table.grid(padding=(0, 2, 0, 2))
    grid.add_row("", Text(finding.message))
    for key, value in finding.evidence.items():
        grid.add_row(Text(key, "dim"), Text(str(value)))
    if finding.fix:
        grid.add_row(Text("fix", "bold"), Text(finding.fix))
    return Group(head, grid)


def render(report: ProbeReport, width: int = 120) -> str:
    """The health table as plain text.

    Args:
        report: A report.
        width: Columns.

    Returns:
        The text.
    """
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(health_table(report))
    return buffer.getvalue().rstrip()
