"""The room is below all others: they import it, and it imports none of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lora_probe_callbacks.restore

ROOM = "lora_probe_callbacks.restore"


def test_restore_imports_torch_and_nothing_of_the_package() -> None:
    modules = sorted(p.stem for p in Path(next(iter(lora_probe_callbacks.restore.__path__))).glob("[!_]*.py"))
    program = "; ".join(f"import {ROOM}.{name}" for name in modules)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {program}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = done.stdout.split()
    assert {"module_state", "model", "optimizer", "random", "tree"} == set(modules)
    assert not {"peft", "transformers", "lightning"} & set(loaded)
    inside = {name for name in loaded if name.startswith("lora_probe_callbacks.") and not name.startswith(ROOM)}
    assert not inside, inside
