"""The whole selftest and the door tests under the releases that are supported, each set in an environment of its own.

Needs a package index and some GB of disk; run by ``make compat``, outside CI::

    python benchmarks/compat.py                      # all sets, into .venv/compat
    python benchmarks/compat.py --only floor --keep
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "compat.json"

# Name of the set -> its pins. torch stays where the CPU builds are small; what is not named is the newest that fits.
FLOOR = (
    "transformers==5.0.0 peft==0.18.0 lightning==2.4.0 accelerate==1.10.0 bitsandbytes==0.46.1 torchmetrics==1.4.0 "
    "safetensors==0.4.3 scipy==1.13.0 rich==13.7.0 typer==0.16.0 typer-slim==0.16.0"
)
SETS = {
    "floor": tuple(FLOOR.split()),
    "middle": ("transformers==5.6.0", "peft==0.18.1", "lightning==2.5.6"),
    "later": ("transformers==5.17.0", "peft==0.20.0", "lightning==2.6.0"),
    "newest": ("transformers", "peft", "lightning", "accelerate"),
}
TORCH = "torch==2.13.0"
TOOLS = ("trl", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "matplotlib", "tensorboard", "tokenizers")
TESTS = (
    "tests/test_import.py",
    "tests/test_parity.py",
    "tests/trainer/test_trainer_door.py",
    "tests/lightning",
    "tests/monitor",
)
SHOWN = (
    *("torch", "transformers", "peft", "lightning", "accelerate", "bitsandbytes", "torchmetrics"),
    *("safetensors", "scipy", "numpy", "rich", "typer"),
)


def made(folder: Path, pins: tuple[str, ...]) -> Path:
    """The Python of an environment with these pins; made if it is not there.

    Raises:
        CalledProcessError: If the pins cannot be installed together.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", TORCH, *pins, *TOOLS, str(ROOT)], check=True)
        subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", "lora_probe_callbacks"], check=True)
    return python


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the checkout's package in an environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([str(python), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def versions(python: Path) -> dict[str, str]:
    """What is installed in an environment."""
    program = f"""
import importlib.metadata as m, json, platform
print(json.dumps({{"python": platform.python_version(), **{{n: m.version(n) for n in {SHOWN!r}}}}}))
"""
    return json.loads(run(python, "-c", program).stdout)


def selftest(python: Path) -> dict[str, Any]:
    """Every fault: how many are found, and which are not."""
    done = run(python, "-W", "ignore", "-c", "from lora_probe_callbacks.cli import app; app(['selftest', '--json'])")
    found = json.loads(done.stdout)
    missed = [fault["fault"] for fault in found["faults"] if not fault["found"]]
    return {"faults": len(found["faults"]), "found": found["found"], "missed": missed}


def tests(python: Path) -> dict[str, Any]:
    """The tests of the doors: how many pass, and the names of those that do not."""
    # A release's own deprecations are no error of ours.
    done = run(python, "-m", "pytest", "-n", "0", "-o", "filterwarnings=default", "-W", "ignore", *TESTS)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout[-400:])}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {**counts, "names": failed}


def main() -> None:
    """Measure the sets that were asked for.

    Raises:
        SystemExit: With 1 if anything is missed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SETS, action="append", help="these sets only; the others' results stay")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "compat", help="of the environments")
    parser.add_argument("--part", choices=("selftest", "tests"), action="append", help="default: both")
    parser.add_argument("--result", type=Path, default=RESULT, help="the file that is written")
    given = parser.parse_args()
    result = json.loads(given.result.read_text()) if given.result.exists() else {}
    for name in given.only or SETS:
        python = made(given.folder / name, SETS[name])
        row = {**result.get(name, {}), "versions": versions(python)}
        for part, measure in (("selftest", selftest), ("tests", tests)):
            if given.part is None or part in given.part:
                row[part] = measure(python)
        result[name] = row
        print(name, json.dumps(row))
        given.result.write_text(json.dumps({key: result[key] for key in SETS if key in result}, indent=2) + "\n")
    bad = [n for n, row in result.items() if row["selftest"]["missed"] or row.get("tests", {}).get("names")]
    sys.exit(f"not all found, or tests failed, under: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
