"""``lora-probe run``: starts a training command, attached to, and says how it went.

The command runs as it would alone, in processes of its own; all that is different is its environment, in which every
Python finds the start-up module that attaches. So it reaches the processes of ``torchrun``, ``accelerate launch`` and
of command lines that start others.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lora_probe_callbacks.integrations.outcomes import VARIABLE, Outcome, Settings, read_outcomes

__all__ = ["run"]

_STARTUP = Path(__file__).parent / "startup"
_NOWHERE = (
    "attached nowhere: nothing below this command trained with a transformers.Trainer, a lightning.pytorch.Trainer or "
    "an Accelerator that prepared an adapter with its optimizer. NOTHING WAS JUDGED; for a loop of your own use "
    "LoraProbeMonitor"
)


def run(command: Sequence[str], intent: Mapping[str, Any], *, strict: bool, tell: Callable[[str], None]) -> int:
    """Run a command, attached to.

    Args:
        command: A program and its arguments; ``-m module`` and ``script.py`` run under this Python.
        intent: Keyword arguments of the doors.
        strict: Whether what was found decides the exit code of a command that went well.
        tell: Receives lines for the user.

    Returns:
        The command's exit code (128 + n if signal n ended it); under ``strict`` 1 if a run was unhealthy, and 2 if
        none was attached to or one is unproven.

    Raises:
        FileNotFoundError: If there is no such program.
    """
    with tempfile.TemporaryDirectory(prefix="lora-probe-") as folder:
        code = _wait(subprocess.Popen(_program(command), env=_environment(Settings(dict(intent), folder))))
        outcomes = read_outcomes(folder)
    for line in _lines(outcomes):
        tell(line)
    return code or (_verdict(outcomes) if strict else 0)


def _program(command: Sequence[str]) -> list[str]:
    first = command[0]
    if first == "-m" or (first.endswith(".py") and not os.access(first, os.X_OK)):
        return [sys.executable, *command]
    if shutil.which(first) is None:
        raise FileNotFoundError(2, "no such program", first)
    return list(command)


def _environment(settings: Settings) -> dict[str, str]:
    before = os.environ.get("PYTHONPATH")
    paths = [str(_STARTUP), *([before] if before else [])]
    return {**os.environ, VARIABLE: settings.in_environment(), "PYTHONPATH": os.pathsep.join(paths)}


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait, and pass on what a scheduler sends; Ctrl-C reaches the command by itself, and is its to answer."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    former = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    former |= {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    try:
        code = process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _lines(outcomes: Sequence[Outcome]) -> list[str]:
    if not outcomes:
        return [_NOWHERE]
    lines: dict[str, int] = {}  # to the processes that say the same
    for outcome in outcomes:
        if outcome.status is None:
            said = "no verdict, its process ended before its run"
        else:
            why = f": {'; '.join(outcome.why)}" if outcome.why else ""
            said = f"{outcome.status}, {outcome.judged_steps} steps judged{why}"
        line = f"attached to {outcome.where}: {said}"
        lines[line] = lines.get(line, 0) + 1
    return [line if times == 1 else f"{line} ({times} times)" for line, times in lines.items()]


def _verdict(outcomes: Sequence[Outcome]) -> int:
    found = {outcome.status for outcome in outcomes}
    if "unhealthy" in found:
        return 1
    return 0 if found == {"healthy"} else 2
