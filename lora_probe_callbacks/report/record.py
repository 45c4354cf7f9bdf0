"""The record: append-only JSON lines, one for each decision, readable after a kill.

    start      the environment, the checks, what is meant
    decision   verdicts, new findings, metrics, and for each tensor its gradient norm and its update;
               the first one, and any after which they changed, names the tensors in their order
    examples   the most and least helpful examples of a step
    error      an error inside the probe itself
    end        all findings; a run that was killed has no such line

Several runs may follow each other in one file. A line that a kill has cut in half is passed over.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_probe_callbacks.checks._base import Check, Verdict
from lora_probe_callbacks.facts import Facts, Gradients, Update
from lora_probe_callbacks.report.findings import Finding
from lora_probe_callbacks.report.report import ProbeReport

__all__ = ["SCHEMA", "Record", "RecordError", "Row", "plain", "read_record"]

SCHEMA = 1

Row = tuple[int, Mapping[str, float]]  # a step's number in the framework, and metrics of that step


class RecordError(ValueError):
    """A file is no record, or one that this version cannot read."""


class Record:
    """Appends lines to a file; each is handed to the system when it is complete.

    Args:
        path: The file; folders are made, an existing file is continued.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._layout: object = None
        if _cut_off(self._path):
            with self._path.open("ab") as file:
                file.write(b"\n")

    def start(self, checks: Iterable[Check], environment: Mapping[str, object], **meant: object) -> None:
        """Write the first line of a run.

        Args:
            checks: The checks that judge in it.
            environment: What it runs on.
            **meant: Adapters, optimizers, cadence and the like.
        """
        self._layout = None
        self._write(
            "start",
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            environment=environment,
            checks=[{"code": c.code, "name": c.name, "family": c.family, "what": c.what} for c in checks],
            **meant,
        )

    def decision(
        self,
        facts: Facts,
        verdicts: Mapping[str, Verdict],
        changed: Sequence[Finding],
        rows: Sequence[Row],
        state: Mapping[str, object],
    ) -> None:
        """Write one decision.

        Args:
            facts: What was known.
            verdicts: Code to verdict.
            changed: The findings that are new or got worse.
            rows: The metrics that were logged for it.
            state: The facts in a few words.
        """
        slots = facts.slots
        named = {}
        if len(slots) and slots.name != self._layout:  # a file that was judged by itself tells of no slots
            self._layout = slots.name
            layers = [facts.units[unit].name for unit in slots.unit]
            columns = zip(layers, slots.name, slots.role.tolist(), slots.adapter, strict=True)
            keys = ("layer", "name", "role", "adapter")
            named = {"tensors": [dict(zip(keys, row, strict=True)) for row in columns]}
        update = facts.update
        self._write(
            "decision",
            moment=facts.moment,
            step=facts.step,
            framework_step=facts.framework_step,
            verdicts={code: _verdict(v) for code, v in verdicts.items()},
            findings=[dataclasses.asdict(f) for f in changed],
            metrics=[{"framework_step": step, "values": dict(values)} for step, values in rows],
            **named,
            gradients=_gradients(facts.gradients),
            update_step=None if update is None else update.step,
            updates=[] if update is None else _sizes(update),
            moved=[] if update is None else [None if math.isnan(v) else _short(v) for v in update.fraction.tolist()],
            state=state,
        )

    def examples(self, listing: Mapping[str, object]) -> None:
        """Write the examples of a step.

        Args:
            listing: Of `ExampleProbe.listing`, with the step's numbers.
        """
        self._write("examples", **listing)

    def error(self, step: int, trace: str) -> None:
        """Write an error inside the probe.

        Args:
            step: The present step.
            trace: Its traceback; the folders of the files in it are left out.
        """
        self._write("error", step=step, traceback=_without_folders(trace))

    def end(self, report: ProbeReport, step: int) -> None:
        """Write the last line of a run.

        Args:
            report: What was found.
            step: The number of steps.
        """
        findings = [dataclasses.asdict(f) for f in report.findings]
        self._write(
            "end",
            step=step,
            healthy=report.healthy,
            status=report.status,
            judged_steps=report.judged_steps,
            proofs=[dataclasses.asdict(proof) for proof in report.proofs.values()],
            open_questions=report.open_questions,
            findings=findings,
        )

    def _write(self, kind: str, **content: object) -> None:
        line = json.dumps(plain({"schema": SCHEMA, "kind": kind, **content}), allow_nan=False, separators=(",", ":"))
        # Opened and closed for each line: what is written outlives this process, whatever ends it.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_record(path: str | Path) -> Iterator[dict[str, Any]]:
    """Read the lines of a record; half lines, left by a kill, are passed over.

    Args:
        path: The file.

    Yields:
        One mapping for each line.

    Raises:
        RecordError: If a line is no line of a record, or was written by a later version.
    """
    cut: int | None = None
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = json.loads(raw)
            except ValueError:
                if cut is not None:
                    break
                cut = number  # right at the end of the file, or of a run that was continued by another
                continue
            if not isinstance(line, dict) or "schema" not in line or "kind" not in line:
                raise RecordError(f"got a line {number} without schema and kind, expected a record of lora_probe")
            if not isinstance(line["schema"], int) or line["schema"] > SCHEMA:
                raise RecordError(
                    f"got schema {line['schema']!r} in line {number}, expected at most {SCHEMA}: the record was "
                    "written by a later version; upgrade lora_probe_callbacks to read it"
                )
            if cut is not None and line["kind"] != "start":
                break
            cut = None
            yield line
        else:
            if cut != 1:
                return
    raise RecordError(f"got a line {cut} that is no JSON, expected a record of lora_probe (one JSON object a line)")


def plain(value: object) -> Any:
    """What JSON can hold.

    Args:
        value: Anything.

    Returns:
        The same in mappings, lists, numbers and strings; numbers that are not finite become None.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    return str(value)


def _cut_off(path: Path) -> bool:
    """The file ends in the middle of a line."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _verdict(verdict: Verdict) -> dict[str, object]:
    content: dict[str, object] = {"status": verdict.status}
    if verdict.message:
        content["message"] = verdict.message
    if verdict.of_update:
        content["of_update"] = True
    return content


def _gradients(gradients: Gradients) -> list[float | str | None]:
    """A norm, "none" where there was no gradient, None where it was not read; nothing if none was."""
    if not gradients.read.any():
        return []
    rows = zip(gradients.norm.tolist(), gradients.present.tolist(), gradients.read.tolist(), strict=True)
    return [_short(norm) if present else "none" if read else None for norm, present, read in rows]


def _sizes(update: Update) -> list[float | str | None]:
    """The size of the change, None where nothing was compared."""
    rows = zip(update.size.tolist(), update.stepped.tolist(), update.broken.tolist(), strict=True)
    return [None if not stepped else "non-finite" if broken else _short(size) for size, stepped, broken in rows]


def _short(value: float) -> float | str:
    return float(f"{value:.4g}") if math.isfinite(value) else "non-finite"


def _without_folders(trace: str) -> str:
    """A traceback with the names of its files alone: where a user keeps them is nobody's business."""
    home = str(Path.home())
    named = re.sub(r'File "(?:.*[\\/])?([^\\/"]+)"', r'File "\1"', trace)
    return named.replace(home, "~") if len(home) > 1 else named
