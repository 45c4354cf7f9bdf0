"""Silence what the frameworks say on a CPU and what says nothing about this run, item by item."""

from __future__ import annotations

import logging
import warnings

import transformers

LOGGERS = {
    # Which hardware was found, tips of the day, "max_epochs reached".
    "lightning.pytorch": "one table per section is enough",
    # Its optional inference kernel for AVX512-BF16 processors; this run trains.
    "bitsandbytes.backends.cpu.ops": "the package `kernels` is not needed",
}

WARNINGS = {
    r".*does not have many workers": "the batches are rows of a tensor in memory",
    r".*isinstance\(treespec, LeafSpec\)": "lightning 2.6 calls what torch 2.13 deprecates",
    r".*gradient_checkpointing.* is deprecated": "peft 0.21 calls what transformers 5.23 deprecates",
    r".*erge lora module to 4-bit linear": "known, and not the fault that is shown here",
}


def quiet_frameworks() -> None:
    """Keep the terminal for what the quickstart has to tell; every other warning is still shown."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    transformers.utils.logging.disable_progress_bar()
