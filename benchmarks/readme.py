"""Make the README's tables: from the catalogue of checks and from benchmarks/results/*.json.

python benchmarks/readme.py                       print them
python benchmarks/readme.py --readme README.md    put them between the file's markers
"""

from __future__ import annotations

import argparse
import itertools
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_probe_callbacks.checks._catalogue import all_checks

SETTING = ("shape", "base", "attention", "checkpointing", "prompts", "responses", "tokens")


BACKENDS = ("doubled_rank", "loop", "alpha", "jvp")


def projection_table(result: dict[str, Any]) -> str:
    """Return the Markdown of one result file: a line for each setting, a column for each backend."""
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    lines = [
        f"{result['device']}, {result['date']} ({versions}); times and peak memory beside the plain training step:",
        "",
        f"| setting | training step | {' | '.join(BACKENDS)} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for _, block in itertools.groupby(result["rows"], key=lambda row: [row[key] for key in SETTING]):
        rows = {row["backend"]: row for row in block}
        step = rows["step"]
        setting = (
            f"{step['shape']}, {step['base']}, {step['attention']}, "
            f"{'checkpointing, ' if step['checkpointing'] else ''}"
            f"{step['prompts']} x {step['responses']} x {step['tokens']} tokens"
        )
        cells = [cell(rows.get(backend), step) for backend in BACKENDS]
        lines.append(f"| {setting} | {step['ms']:.0f} ms, {step['gib']:.1f} GiB | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row: dict[str, Any] | None, step: dict[str, Any]) -> str:
    """Return one backend's time and memory relative to the step, or why it has none."""
    if row is None:
        return ""
    if "failed" in row:
        return textwrap.shorten(row["failed"].replace("|", "/"), 60, placeholder=" ...")
    memory = f", x {row['gib'] / step['gib']:.2f} memory" if step["gib"] else ""
    return f"{row['ms']:.0f} ms, x {row['ms'] / step['ms']:.2f}{memory}"


def projections(results: Path) -> str:
    """Return the tables of the projection benchmarks that ran on a GPU."""
    files = sorted(path for path in results.glob("projection-*.json") if "cpu" not in path.name)
    return "\n\n".join(projection_table(json.loads(path.read_text())) for path in files)


def checks(_results: Path) -> str:
    """Return one row a check."""
    rows = [f"| {check.code} | {check.name} | {check.what} |" for check in all_checks()]
    return "\n".join(["| code | name | what it reports |", "| --- | --- | --- |", *rows])


def latency(results: Path) -> str:
    """Return how late a fault is found, by cadence."""
    result = json.loads((results / "latency.json").read_text())
    first = result["first_bad_step"]
    rows = [f"| {r['every_n_steps']} | {r['found_at']} | {r['steps_late']} |" for r in result["rows"]]
    header = [f"| every_n_steps | merged from step {first} on, found at step | steps late |", "| --- | --- | --- |"]
    return "\n".join([*header, *rows])


def overhead(results: Path) -> str:
    """Return what the probe takes."""
    lines = [
        "| shape | device | adapter tensors | plain step | a probed step | between probes | default cadence |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(results.glob("overhead-*.json")):
        result = json.loads(path.read_text())
        rows = result["rows"]
        lines.append(
            f"| {result['shape']} | {result['device']} | {result['adapter_tensors']} | {rows['plain']['ms']:.0f} ms "
            f"| x {rows['every step']['ratio']:.2f} | x {rows['between probes']['ratio']:.3f} "
            f"| x {result['default_cadence']:.4f} |"
        )
    return "\n".join(lines)


def side_by_side(results: Path) -> str:
    """Return what each tool found, missed, and reported of healthy runs."""
    result = json.loads((results / "detection.json").read_text())
    of = result["healthy"]
    rows = [f"| {name} | {' | '.join(str(count) for count in row.values())} |" for name, row in result["table"].items()]
    alarms = f"false alarms on {of['of LoRA']} LoRA runs | on {of['of other tuners']} runs of other tuners"
    head = f"| | found of {result['faults']} faults | missed | {alarms} |"
    return "\n".join([head, "| --- | --- | --- | --- | --- |", *rows])


def peft_matrix(results: Path) -> str:
    """Return what became of PEFT's own test cases."""
    result = json.loads((results / "peft-matrix.json").read_text())
    rows = [
        f"| {kind} | {c['cases']} | {c['quiet']} | {c['warn'] + c['fail']} | {c['fault of PEFT']} | {c['crash']} "
        f"| {c['changed by the probe']} | {c['does not train']} |"
        for kind, c in ((kind, result[kind]) for kind in ("lora", "other tuners"))
    ]
    columns = "cases | quiet | alarms | faults of PEFT | crashes | changed | untrainable"
    head = f"| peft {result['versions']['peft']} | {columns} |"
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- | --- | --- |", *rows])


def gradients(results: Path) -> str:
    """Return how many healthy gradients LP307 reports, and how many that are wrong."""
    result = json.loads((results / "gradients.json").read_text())
    cells: dict[str, list[int]] = {}
    for kind in ("healthy", "wrong"):
        for row in result[kind]:
            cell = cells.setdefault("healthy" if kind == "healthy" else row["group"][0], [0, 0])
            cell[0] += row["reported"]
            cell[1] += row["runs"]
    counts = " | ".join(f"{reported} of {runs}" for reported, runs in cells.values())
    head = f"| | {' | '.join(cells)} |"
    return "\n".join([head, f"| {' | '.join(['---'] * (len(cells) + 1))} |", f"| LP307 | {counts} |"])


def releases(results: Path) -> str:
    """Return what was run under which releases, and what it found."""
    result = json.loads((results / "compat.json").read_text())
    shown = ("transformers", "peft", "lightning", "accelerate", "torch")
    lines = [f"| {' | '.join(shown)} | faults found | door tests |", f"| {' | '.join(['---'] * (len(shown) + 2))} |"]
    for row in result.values():
        faults, tests = row["selftest"], row.get("tests")
        cells = [row["versions"][name] for name in shown]
        said = "not run" if tests is None else f"{tests['passed']} passed, {len(tests['names'])} failed"
        lines.append(f"| {' | '.join(cells)} | {faults['found']} of {faults['faults']} | {said} |")
    return "\n".join(lines)


def frameworks(results: Path) -> str:
    """Return what the runner saw of the frameworks' own command lines."""
    result = json.loads((results / "frameworks.json").read_text())
    lines = [
        "| framework | transformers, peft | packages changed by installing | losses with and without | healthy run "
        "| learning rate 0 | merged |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result.items():
        versions = f"{row['versions']['transformers']}, {row['versions']['peft']}"
        changed = ", ".join(row["changed by installing this package"]) or "none"
        same = "the same" if row["losses are the same"] else "DIFFERENT"
        runs = [row.get(run) for run in ("probed", "learning rate 0", "merged")]
        said = ["not run" if run is None else _verdict(run["said"]) for run in runs]
        lines.append(f"| {name} | {versions} | {changed} | {same} | {' | '.join(said)} |")
    return "\n".join(lines)


def _verdict(said: list[str]) -> str:
    """Return the verdict of a run without the trainer's name and the steps."""
    _, _, verdict = said[-1].removeprefix("lora-probe run: attached to ").partition(": ")
    status, _, why = verdict.partition(", ")
    return f"{status} {why.partition(': ')[2]}".strip()


SECTIONS: dict[str, Callable[[Path], str]] = {
    "checks": checks,
    "side by side": side_by_side,
    "peft matrix": peft_matrix,
    "gradients": gradients,
    "latency": latency,
    "overhead": overhead,
    "projection benchmark": projections,
}


# Of docs/frameworks/versions.md
PAGE: dict[str, Callable[[Path], str]] = {"releases": releases, "frameworks": frameworks}


def filled(text: str, results: Path, sections: dict[str, Callable[[Path], str]] = SECTIONS) -> str:
    """Return a README with every section made anew between its markers."""
    for name, make in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"the file lacks the markers {begin} and {end}")
        text = f"{text.split(begin)[0]}{begin}\n{make(results)}\n{end}{text.split(end)[1]}"
    return text


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, or write them between the markers of a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--page", type=Path, help="docs/frameworks/versions.md")
    options = parser.parse_args(arguments)
    if options.page is not None:
        options.page.write_text(filled(options.page.read_text(), options.results, PAGE))
    if options.readme is None and options.page is None:
        print("\n\n".join(make(options.results) for make in (*SECTIONS.values(), *PAGE.values())))
    elif options.readme is not None:
        options.readme.write_text(filled(options.readme.read_text(), options.results))


if __name__ == "__main__":
    main()
