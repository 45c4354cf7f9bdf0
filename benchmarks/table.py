"""Make the README's tables from benchmarks/results/*.json.

python benchmarks/table.py                       print them
python benchmarks/table.py --readme README.md    put them between the file's markers
"""

from __future__ import annotations

import argparse
import itertools
import json
import textwrap
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- projection benchmark -->", "<!-- end of projection benchmark -->"
SETTING = ("shape", "base", "attention", "checkpointing", "prompts", "responses", "tokens")


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of one result file."""
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    lines = [
        f"{result['device']}, {result['date']} ({versions}):",
        "",
        "| setting | backend | time | time / step | peak memory | memory / step | error to the loop |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for _, block in itertools.groupby(result["rows"], key=lambda row: [row[key] for key in SETTING]):
        rows = list(block)
        step = next(row for row in rows if row["backend"] == "step")
        lines.extend(line(row, step) for row in rows)
    return "\n".join(lines)


def line(row: dict[str, Any], step: dict[str, Any]) -> str:
    """Return one backend's line, relative to the plain training step of its block."""
    setting = (
        f"{row['shape']}, {row['base']}, {row['attention']}"
        f"{', checkpointing' if row['checkpointing'] else ''}, "
        f"{row['prompts']} x {row['responses']} x {row['tokens']} tokens"
    )
    name = {"step": "training step", "jvp": "forward mode (refused as a backend)"}.get(row["backend"], row["backend"])
    if "failed" in row:
        why = textwrap.shorten(row["failed"].replace("|", "/"), 90, placeholder=" ...")
        return f"| {setting} | {name} | {why} | | | | |"
    time = f"{row['ms']:.0f} ms" if row["ms"] >= 100 else f"{row['ms']:.1f} ms"
    memory = f"{row['gib']:.1f} GiB" if row["gib"] >= 0.1 else f"{row['gib'] * 1024:.0f} MiB"
    relative = ["", ""]
    if "failed" not in step and row is not step:
        relative = [f"{row['ms'] / step['ms']:.2f}", f"{row['gib'] / step['gib']:.2f}" if step["gib"] else ""]
    error = f"{row['error_to_loop']:.0e}" if "error_to_loop" in row else ""
    return f"| {setting} | {name} | {time} | {relative[0]} | {memory} | {relative[1]} | {error} |"


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, or write them between the markers of a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--readme", type=Path)
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("projection-*.json"))
    text = "\n\n".join(table(json.loads(path.read_text())) for path in files)
    if options.readme is None:
        print(text)
        return
    readme = options.readme.read_text()
    if BEGIN not in readme or END not in readme:
        raise SystemExit(f"{options.readme} lacks the markers {BEGIN} and {END}")
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    options.readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
