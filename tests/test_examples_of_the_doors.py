"""The examples of the Trainer, of TRL and of Accelerate run as a user runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "figures", "least"),
    [
        ("trainer_sft", r"held-out loss (\S+) -> (\S+)", -0.5),
        ("trl_dpo", r"reward margin (\S+) in the first ten steps, (\S+) in the last ten", 0.3),
        ("accelerate_loop", r"held-out loss (\S+) -> (\S+)", -0.5),
    ],
)
def test_example_learns_and_ends_in_the_health_table(name: str, figures: str, least: float) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, "an example is quiet"
    words, table = done.stdout.split("LoRA probe: healthy", 1)
    assert len(words.splitlines()) <= 3, words
    before, after = map(float, re.search(figures, words).groups())  # type: ignore[union-attr]
    assert (after - before) / least > 1, words
    assert "LP405" in table.split("LP403")[-1], "the table is the last word"
    for code in ("LP101", "LP103", "LP201", "LP302", "LP401"):
        assert re.search(rf"{code}\s+\S+\s+pass", table), table
