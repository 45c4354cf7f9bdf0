"""The example of the estimator inside training runs from end to end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from lora_probe_callbacks.report.runs import read_runs


def test_predicted_and_measured_change_stand_side_by_side(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "rl_entropy_probe.py"
    done = subprocess.run(
        [sys.executable, str(example), "--plot", f"{tmp_path}/plot.png", "--record", f"{tmp_path}/run.jsonl"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    agree, steps = map(int, re.findall(r"in (\d+) of (\d+) steps", done.stdout)[0])
    assert steps == 16
    assert agree >= 13
    predicted, measured = map(float, re.findall(r"predicted ([-+][\d.]+), measured ([-+][\d.]+)", done.stdout)[0])
    assert predicted * measured > 0
    run = read_runs(tmp_path / "run.jsonl")[-1]
    assert run.report.healthy
    assert run.history.series("estimator/delta_1")[0] == list(range(16))
    assert (tmp_path / "plot.png").exists() or "matplotlib is not installed" in done.stdout
