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
def test_example_learns_and_ends_in_the_proofs(name: str, figures: str, least: float) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, "an example is quiet"
    words, proofs = done.stdout.split("LoRA probe: healthy", 1)
    assert len(proofs.splitlines()) <= 12, proofs
    assert len(words.splitlines()) <= 3, words
    before, after = map(float, re.search(figures, words).groups())  # type: ignore[union-attr]
    assert (after - before) / least > 1, words
    for claim in ("active", "reached", "owned", "moved", "seen"):
        assert re.search(rf"{claim} +(\d+)/\1 ", proofs), proofs
