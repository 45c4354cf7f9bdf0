"""Every fault of :mod:`~lora_probe_callbacks.faults` on a tiny model: which check finds it, and when?

The runs are plain loops of a few steps on the CPU, watched as a user would watch them. A fault counts as found if the
check that it names is the only one that fails or warns, in the step that it names or before.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lora_probe_callbacks.faults import FAULTS, Fault
from lora_probe_callbacks.faults._models import LENGTH, VOCABULARY, Trial, adamw
from lora_probe_callbacks.faults.trials import trial_of
from lora_probe_callbacks.monitor import LoraProbeMonitor
from lora_probe_callbacks.report.findings import Finding, LoraProbeError

__all__ = ["Outcome", "outcome_of", "selftest"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the probe said of one fault.

    Attributes:
        fault: The fault.
        finding: What was found, the right one first; None if nothing was.
        others: Codes of what was found beside it.
        due: The last step at which it should be found.
        seconds: How long it took.
    """

    fault: Fault
    finding: Finding | None
    others: tuple[str, ...]
    due: int
    seconds: float

    @property
    def found(self) -> bool:
        """By the right check, in time, and by no other."""
        f = self.finding
        return f is not None and f.code == self.fault.code and f.step <= self.due and not self.others


def selftest() -> Iterator[Outcome]:
    """Run every fault.

    Yields:
        One outcome a fault, in the order of the entries.
    """
    for fault in FAULTS.values():
        yield outcome_of(fault)


def outcome_of(fault: Fault) -> Outcome:
    """Run one fault and look at what the probe says.

    Args:
        fault: One of :data:`~lora_probe_callbacks.faults.FAULTS`.

    Returns:
        What was found.
    """
    began = time.perf_counter()
    # PEFT and torch warn of some of these themselves, among many other lines: that is not what is tested.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _quiet("transformers"):
        warnings.simplefilter("ignore")
        trial = trial_of(fault)
        findings = _findings(trial, steps=trial.begins + fault.by_step + 2)
    right = [f for f in findings if f.code == fault.code]
    first = next(iter(right or findings), None)
    return Outcome(
        fault=fault,
        finding=first,
        others=tuple(f.code for f in findings if f is not first),
        due=trial.begins + fault.by_step,
        seconds=time.perf_counter() - began,
    )


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _findings(trial: Trial, steps: int) -> list[Finding]:
    optimizer = adamw(trial.model) if trial.optimizer is None else trial.optimizer
    generator = torch.Generator().manual_seed(1)
    probe = LoraProbeMonitor(
        trial.model, optimizer, scaler=trial.scaler, every_n_steps=1, verbose=False, **trial.intent
    )
    with contextlib.suppress(LoraProbeError), trial.around, probe:
        for step in range(steps):
            trial.between(step)
            ids = torch.randint(1, VOCABULARY, (2, LENGTH), generator=generator)
            loss = trial.loss(trial.model, ids, step)
            if trial.scaler is None:
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            else:
                trial.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                trial.scaler.step(optimizer)
                trial.scaler.update()
            optimizer.zero_grad(set_to_none=trial.set_to_none)
    return probe.report.with_status("fail", "warn")
