"""Imported first, this silences what the frameworks say on a CPU and what says nothing about the run.

Item by item, each with its reason; every other warning is still shown.
"""

from __future__ import annotations

import logging
import warnings

import lightning.pytorch  # noqa: F401  before the loggers: its import sets the level of its own
import transformers

LOGGERS = {
    "lightning.pytorch": "hardware found, tips, max_epochs reached: the tables tell what matters",
    "bitsandbytes.backends.cpu.ops": "at import: an optional inference kernel is missing; this run trains",
}

WARNINGS = {
    r".*does not have many workers": "the batches are rows of a tensor in memory",
    r".*isinstance\(treespec, LeafSpec\)": "lightning 2.6 calls what torch 2.13 deprecates",
    r".*gradient_checkpointing.* is deprecated": "peft 0.21 calls what transformers 5.23 deprecates",
    r".*erge lora module to 4-bit linear": "rounding when merging; known, and not the fault shown here",
}

for name in LOGGERS:
    logging.getLogger(name).setLevel(logging.ERROR)
for message in WARNINGS:
    warnings.filterwarnings("ignore", message=message)
transformers.utils.logging.disable_progress_bar()
