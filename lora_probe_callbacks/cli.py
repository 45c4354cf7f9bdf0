"""The command ``lora-probe``."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lora_probe_callbacks.checks.base import Check
from lora_probe_callbacks.checks.catalogue import all_checks

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Does the LoRA adapter train?")


@app.command()
def explain(code: Annotated[str, typer.Argument(help="Code or name of a check, for instance LP103.")]) -> None:
    """Say what a check looks at, why the fault is silent, and how to mend it."""
    found = [check for check in all_checks() if code.upper() == check.code or code == check.name]
    if not found:
        typer.echo(f"got {code!r}, expected a code or a name from `lora-probe checks`", err=True)
        raise typer.Exit(2)
    typer.echo(explanation(found[0]))


@app.command()
def checks() -> None:
    """List all checks."""
    table = Table("code", "name", "family", "what", box=None, pad_edge=False)
    for check in all_checks():
        table.add_row(check.code, check.name, check.family, check.what)
    Console().print(table)


def explanation(check: Check) -> str:
    """The text of a check, as the command prints it.

    Args:
        check: A check of the catalogue.

    Returns:
        Some lines of plain text.
    """
    parts = [f"{check.code} {check.name} ({check.family})"]
    for title, text in (
        ("What it reports", check.what),
        ("Why it is silent", check.why),
        ("What to do", check.fix),
        ("Stays quiet on", check.quiet),
        ("Public reports", ", ".join(check.threads)),
    ):
        if text:
            parts.append(f"\n{title}\n{textwrap.indent(textwrap.fill(text, 100), '  ')}")
    return "\n".join(parts)


def main() -> None:
    """Run the command."""
    app()
