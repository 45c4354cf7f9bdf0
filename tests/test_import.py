"""Importing the package is cheap: each framework is loaded by the door that needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lora_probe_callbacks

HEAVY = {"lightning", "pytorch_lightning", "transformers", "peft", "bitsandbytes", "torchmetrics", "accelerate"}


def loaded_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import lora_probe_callbacks",
        "import lora_probe_callbacks as package; dir(package); package.__version__",
        "from lora_probe_callbacks import Finding, LoraProbeError, ProbeReport",
    ],
)
def test_import_loads_no_framework(code):
    assert not loaded_after(code) & HEAVY


def test_callback_loads_lightning():
    """The test above would pass on a package that cannot be used."""
    assert {"lightning", "peft"} <= loaded_after("from lora_probe_callbacks import LoraProbe")


def test_every_public_name_is_there():
    assert set(lora_probe_callbacks.__all__) <= set(dir(lora_probe_callbacks))
    for name in lora_probe_callbacks.__all__:
        assert getattr(lora_probe_callbacks, name) is not None


def test_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="no attribute 'LoraProb'"):
        lora_probe_callbacks.LoraProb  # noqa: B018
