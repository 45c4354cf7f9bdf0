"""What a process under ``lora-probe run`` tells the runner: one small file for each run that it attached to."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

if TYPE_CHECKING:
    from lora_probe_callbacks.report.report import ProbeReport

__all__ = ["VARIABLE", "Outcome", "Settings", "begin", "read_outcomes"]

VARIABLE = "LORA_PROBE_RUN"  # of the environment: the settings, for every process below the runner


@dataclass(frozen=True)
class Settings:
    """What the runner asks of the processes below it.

    Attributes:
        intent: Keyword arguments of the doors.
        folder: Where they leave their outcomes.
    """

    intent: dict[str, Any]
    folder: str

    @classmethod
    def of_this_process(cls) -> Self:
        """The settings that the runner put into the environment."""
        return cls(**json.loads(os.environ[VARIABLE]))

    def in_environment(self) -> str:
        """The value of the variable."""
        return json.dumps(asdict(self))


@dataclass
class Outcome:
    """One run that was attached to.

    Attributes:
        where: The trainer, in words.
        status: That of the report; None while the run goes on, and for ever if its process was killed.
        why: What failed, or what keeps the run from being proven.
        judged_steps: Steps that were judged.
    """

    where: str
    status: str | None = None
    why: list[str] | None = None
    judged_steps: int = 0

    def begin(self, folder: str) -> Self:
        """Leave a first word, so that a process that is killed is known to have been attached to."""
        self._path = Path(folder) / f"{os.getpid()}-{uuid4().hex}.json"
        self._write()
        return self

    def fail(self, error: Exception) -> None:
        """Nothing could be attached: say so, whatever filters the script has for warnings, and go on."""
        text = f"could not attach: {type(error).__name__}: {error}"
        sys.stderr.write(f"lora-probe run: {self.where}: {text}; training goes on\n")
        self.status, self.why = "unproven", [text]
        self._write()

    def end(self, report: ProbeReport) -> None:
        """Leave the last word, unless it was said."""
        if self.status is not None:
            return
        self.status, self.judged_steps = report.status, report.judged_steps
        self.why = [f"{f.code} {f.name}" for f in report.failures] or report.why_unproven()
        self._write()

    def _write(self) -> None:
        if self._path.parent.is_dir():  # a process may outlive its runner
            self._path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def begin(where: str) -> Outcome:
    """Leave word that a run is attached to.

    Args:
        where: The trainer, in words.

    Returns:
        Takes the last word.
    """
    folder = Settings.of_this_process().folder
    return Outcome(where).begin(folder)


def read_outcomes(folder: str) -> list[Outcome]:
    """What the processes left.

    Args:
        folder: That of the settings.

    Returns:
        The outcomes, in the order in which their runs began.
    """
    paths = sorted(Path(folder).glob("*.json"), key=lambda path: path.stat().st_ctime_ns)
    return [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]
