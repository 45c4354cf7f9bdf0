"""The example that finds mislabelled rows finds them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "find_bad_rows.py"


def test_mislabelled_rows_rise_to_the_top(tmp_path: Path) -> None:
    picture = tmp_path / "rows.png"
    command = [sys.executable, str(EXAMPLE), "--plot", str(picture), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"chance finds (\S+)\nprecision at 20: (\S+) by gain", done.stdout)
    assert found is not None, done.stdout
    chance, precision = map(float, found.groups())
    assert precision > 5 * chance
    assert picture.stat().st_size > 5000
