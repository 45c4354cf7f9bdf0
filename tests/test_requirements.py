"""The ranges of what is required hold beside the pins of the frameworks in which people fine-tune."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
REQUIRED = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}

# What an installation of the framework resolved to, or pins, where it is older than the newest (PyPI, 2026-11).
INSTALLED = {
    "llamafactory 0.9.5": {"transformers": "5.6.0", "peft": "0.18.1"},
    "axolotl 0.19.0": {"transformers": "5.16.1"},
    "verl 0.9.1": {"transformers": "5.10.0"},
    "openrlhf 0.11.2": {"transformers": "5.15.0"},
    "unsloth 2026.10.9": {"transformers": "5.17.0"},
    "nemo-toolkit[core]": {"lightning": "2.4.0"},
}


@pytest.mark.parametrize("framework", INSTALLED)
def test_what_a_framework_has_installed_stays(framework: str) -> None:
    refused = {n: v for n, v in INSTALLED[framework].items() if Version(v) not in REQUIRED[n]}
    assert not refused


def test_all_six_are_declared_with_a_floor_and_without_a_ceiling() -> None:
    for name in ("torch", "lightning", "transformers", "peft", "bitsandbytes", "torchmetrics"):
        assert {part.operator for part in REQUIRED[name]} == {">="}, name
