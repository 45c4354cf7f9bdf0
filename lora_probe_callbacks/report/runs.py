"""The runs of a record, put together again from its lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_probe_callbacks.facts import Claim, Proof
from lora_probe_callbacks.report.findings import Finding
from lora_probe_callbacks.report.history import History
from lora_probe_callbacks.report.record import RecordError, read_record
from lora_probe_callbacks.report.report import ProbeReport

__all__ = ["Cell", "Decision", "Run", "Tensor", "read_runs"]

# What a recorded tensor may hold at a step: a norm, "none" (no gradient), "non-finite", or None: not read.
Cell = float | str | None


@dataclass(frozen=True, slots=True)
class Tensor:
    """One adapter tensor of a record."""

    layer: str
    name: str
    role: str
    adapter: str


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision of a record.

    Attributes:
        moment: ``start``, ``step``, ``skipped``, ``end`` or ``exception``.
        step: Of this run, from 0.
        framework_step: The framework's number of it.
        verdicts: Code to ``status``, ``message`` and ``of_update``.
        gradients: Tensor to the norm of its gradient at this step.
        update_step: The step that ``updates`` tell of.
        updates: Tensor to the size of its change in that step.
    """

    moment: str
    step: int
    framework_step: int
    verdicts: Mapping[str, Mapping[str, Any]]
    gradients: Mapping[Tensor, Cell]
    update_step: int | None
    updates: Mapping[Tensor, Cell]


@dataclass(slots=True)
class Run:
    """One run of a record.

    Attributes:
        start: What its first line says: time, environment, checks, adapters and more.
        decisions: In their order.
        history: The metrics of its steps.
        examples: The most and least helpful examples by step, as the probe listed them.
        errors: Tracebacks of errors inside the probe.
        ended: It has a last line; a run without was killed, or still goes on.
        report: What was found, as ``probe.report`` had it.
    """

    start: Mapping[str, Any]
    decisions: list[Decision] = field(default_factory=list)
    history: History = field(default_factory=History)
    examples: list[Mapping[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    ended: bool = False
    report: ProbeReport = field(default_factory=ProbeReport)

    @property
    def steps(self) -> list[int]:
        """The steps that were decided, each once."""
        return list(dict.fromkeys(d.step for d in self.decisions if d.moment in ("step", "skipped")))


def read_runs(path: str | Path) -> list[Run]:
    """Read a record.

    Args:
        path: The file.

    Returns:
        Its runs, the oldest first; one at least.

    Raises:
        RecordError: If it is no record, or one that this version cannot read.
    """
    try:
        runs = [_run(lines) for lines in _by_run(read_record(path))]
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"got a line that lacks something ({error!r}), expected a record of lora_probe") from error
    if not runs:
        raise RecordError("got no finished line, expected a record of lora_probe: no run has begun in it")
    return runs


def _by_run(lines: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    run: list[dict[str, Any]] = []
    for line in lines:
        if line["kind"] == "start" and run:
            yield run
            run = []
        run.append(line)
    if run:
        yield run


def _run(lines: Sequence[dict[str, Any]]) -> Run:
    if lines[0]["kind"] != "start":
        raise RecordError(f"got a first line of kind {lines[0]['kind']!r}, expected 'start': the beginning is missing")
    run = Run(start=lines[0])
    tensors: list[Tensor] = []
    found: dict[tuple[str, str], Finding] = {}
    for line in lines[1:]:
        kind = line["kind"]
        if kind == "decision":
            if "tensors" in line:
                tensors = [Tensor(t["layer"], t["name"], t["role"], t["adapter"]) for t in line["tensors"]]
            run.decisions.append(_decision(line, tensors))
            for row in line["metrics"]:
                values = {name: value for name, value in row["values"].items() if value is not None}
                run.history.add(row["framework_step"], values)
                run.report.metrics.update(values)
            _enter(found, line, run.start["checks"])
        elif kind == "examples":
            run.examples.append(line)
        elif kind == "error":
            run.errors.append(line["traceback"])
        elif kind == "end":
            run.ended = True
            found = {(f["code"], f["cause"]): Finding(**f) for f in line["findings"]}
            run.report.judged_steps = line["judged_steps"]
            run.report.proofs = _proofs(line)
            run.report.open_questions = [*line.get("open_questions", [])]
            if "proofs" not in line:
                run.report.open_questions.append("this record was written by a version that kept no proofs")
    if not run.ended:
        run.report.judged_steps = len(run.steps)
        run.report.open_questions.append("the record ends in the middle of a run: it was killed, or still goes on")
    bad = {f.code for f in found.values() if f.status in ("fail", "warn")}
    rank = ("fail", "warn", "pass", "pending", "skipped")
    listed = [f for f in found.values() if f.status in ("fail", "warn") or f.code not in bad]
    run.report.findings = sorted(listed, key=lambda f: (rank.index(f.status), f.code))
    run.report.internal_errors = run.errors
    run.report.history = run.history
    return run


def _proofs(line: Mapping[str, Any]) -> dict[Claim, Proof]:
    return {p["claim"]: Proof(**{**p, "missing": tuple(p["missing"])}) for p in line.get("proofs", [])}


def _decision(line: Mapping[str, Any], tensors: Sequence[Tensor]) -> Decision:
    return Decision(
        moment=line["moment"],
        step=line["step"],
        framework_step=line["framework_step"],
        verdicts=line["verdicts"],
        gradients=dict(zip(tensors, line["gradients"], strict=False)),
        update_step=line["update_step"],
        updates=dict(zip(tensors, line["updates"], strict=False)),
    )


def _enter(found: dict[tuple[str, str], Finding], line: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]) -> None:
    """What the findings of a run without an end are known to be: those that were new, and the other verdicts."""
    for finding in line["findings"]:
        found[finding["code"], finding["cause"]] = Finding(**finding)
    names = {check["code"]: (check["name"], check["family"]) for check in checks}
    for code, verdict in line["verdicts"].items():
        status, known = verdict["status"], found.get((code, ""))
        replaces = known is None or status == "pass" or known.status == "pending" or known.status == status
        if status in ("fail", "warn") or not replaces or (known is not None and known.status in ("fail", "warn")):
            continue
        name, family = names.get(code, (code, ""))
        found[code, ""] = Finding(
            code=code,
            name=name,
            family=family,
            status=status,
            message=verdict.get("message", ""),
            evidence={},
            fix="",
            step=line["step"],
            framework_step=line["framework_step"],
            last_step=line["step"],
        )
