"""The example of the estimator inside training runs from end to end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_predicted_and_measured_change_stand_side_by_side(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "rl_entropy_probe.py"
    done = subprocess.run(
        [sys.executable, str(example), "--plot", str(tmp_path / "plot.png")],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    inside, steps = map(int, re.findall(r"in (\d+) of (\d+) steps", done.stdout)[0])
    assert steps == 16
    assert inside >= 10
    predicted, measured = map(float, re.findall(r"predicted ([-+][\d.]+), measured ([-+][\d.]+)", done.stdout)[0])
    assert predicted * measured > 0
    assert (tmp_path / "plot.png").exists() or "matplotlib is not installed" in done.stdout
