"""What a user reads in the terminal: a few lines for a healthy run, the finding last for another."""

from __future__ import annotations

import io
import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_probe_callbacks.facts import Proof
from lora_probe_callbacks.report.findings import Finding

if TYPE_CHECKING:
    from lora_probe_callbacks.report.report import ProbeReport

__all__ = ["Output", "details", "finding_panel", "plain_text", "summary"]

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "pending": "cyan", "skipped": "dim"}
_TITLES = {
    "healthy": ("healthy", "bold green"),
    "unhealthy": ("UNHEALTHY", "bold red"),
    "unproven": ("UNPROVEN", "bold yellow"),
}
_LOG = logging.getLogger("lora_probe")


class Output:
    """Prints to the standard error, around progress bars; what nobody should miss is logged when it is quiet.

    Args:
        verbose: 0 nothing but errors, 1 findings and the summary, 2 the table of all checks too.
        main_rank: This process prints.
    """

    def __init__(self, verbose: int, *, main_rank: bool) -> None:
        self._verbose = verbose if main_rank else 0
        self._main_rank = main_rank

    def finding(self, finding: Finding) -> None:
        """A finding, when it is new."""
        if self._verbose:
            self._print(finding_panel(finding))

    def summary(self, report: ProbeReport) -> None:
        """The end of a run."""
        if self._verbose:
            self._print(details(report) if self._verbose > 1 else summary(report))

    def once(self, text: str) -> None:
        """What nobody should miss: that something could not be judged."""
        if self._verbose:
            self._print(Text(f"LoRA probe: {text}"))
        elif self._main_rank:
            _LOG.warning("LoRA probe: %s", text)

    def _print(self, what: RenderableType) -> None:
        with _beside_progress_bars():
            Console(stderr=True).print(what)


def _beside_progress_bars() -> AbstractContextManager[object]:
    """Tqdm clears its bars and draws them again below what was printed."""
    tqdm = sys.modules.get("tqdm")
    return nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(file=sys.stderr)


def summary(report: ProbeReport) -> RenderableType:
    """The proofs, one line a claim; findings last, where the eye is.

    Args:
        report: A report.

    Returns:
        Something that rich can print.
    """
    parts: list[RenderableType] = [_headline(report)]
    if report.proofs:
        parts.append(Padding(_claims(report), (0, 0, 0, 2)))
    parts += [Padding(Text(line), (0, 0, 0, 2)) for line in _beside_the_claims(report)]
    parts.append(Padding(Text(_counts(report), "dim"), (0, 0, 0, 2)))
    parts += [Padding(finding_panel(f), (0, 0, 0, 2)) for f in reversed(report.with_status("fail", "warn"))]
    return Group(*parts)


def details(report: ProbeReport) -> RenderableType:
    """The summary, and every check: judged up to which step, or why not.

    Args:
        report: A report.

    Returns:
        Something that rich can print.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for title in ("code", "check", "verdict", "judged up to step, or why not"):
        table.add_column(title, overflow="fold")
    for finding in report.with_status("pass", "pending", "skipped"):
        detail = f"step {finding.last_step}" if finding.status == "pass" else finding.message
        table.add_row(finding.code, finding.name, Text(finding.status, _STYLES[finding.status]), Text(detail))
    return Group(summary(report), Padding(table, (1, 0, 0, 2)))


def _headline(report: ProbeReport) -> Text:
    word, style = _TITLES[report.status]
    head = Text.assemble("LoRA probe: ", (word, style))
    proofs = [proof for proof in report.proofs.values() if not proof.sampled]
    if not proofs:
        return head
    steps = [p.step for p in proofs if p.step is not None]
    least = min(proofs, key=lambda p: p.proven)
    upto = f" up to step {max(steps)}" if steps else ""
    return head.append(f". {least.proven} of {least.expected} adapter tensors proven{upto}")


def _claims(report: ProbeReport) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for proof in report.proofs.values():
        share = f"{proof.proven}/{proof.expected}"
        table.add_row(
            proof.claim,
            Text(share, "green" if proof.complete else "yellow"),
            "" if proof.step is None else f"step {proof.step}",
            Text(_remark(proof, report)),
        )
    return table


def _remark(proof: Proof, report: ProbeReport) -> str:
    if proof.why and not proof.complete:
        return proof.why
    size = report.metrics.get("lora_probe/update/relative_norm")
    remarks = [proof.detail] if proof.detail else []
    if proof.claim == "moved" and size is not None:
        remarks.append(f"relative update {size:.1e}")
    if proof.idle and proof.claim == "active":
        remarks.append(f"{proof.idle} idle: their layers have not run")
    return f"({'; '.join(remarks)})" if remarks else ""


def _beside_the_claims(report: ProbeReport) -> list[str]:
    if report.status != "unproven":
        return report.open_questions
    claims = tuple(f"{claim}:" for claim in report.proofs)
    return [reason for reason in report.why_unproven() if not reason.startswith(claims)]


def _counts(report: ProbeReport) -> str:
    number = {status: len(report.with_status(status)) for status in ("pass", "warn", "fail", "pending", "skipped")}
    parts = [f"{number['pass']} checks passed", f"{number['warn']} warned"]
    parts += [f"{number['fail']} failed"] if number["fail"] else []
    parts += [f"{number['pending']} undecided"] if number["pending"] else []
    parts += [f"{number['skipped']} not applicable"]
    return f"{', '.join(parts)}   (print(report.details) lists them)"


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


def plain_text(what: RenderableType, width: int = 120) -> str:
    """Something that rich can print, as plain text.

    Args:
        what: It.
        width: Columns.

    Returns:
        The text.
    """
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(what)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())
