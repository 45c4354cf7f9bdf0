"""The healthy matrix: nothing fails, nothing warns, the essential checks have judged, and training is not changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.matrix import CASES, ESSENTIAL, Case

from lora_probe_callbacks import LoraProbeMonitor

# A tuner that is not LoRA is judged by its gradients and updates alone.
OF_ANY_TUNER = frozenset(["LP201", "LP203", "LP302", "LP303", "LP401", "LP501"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, about the very settings that are the case
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_healthy(case: Case, folder: Path) -> None:
    alone, watched = case.make(folder), case.make(folder)
    alone.fit()
    left = torch.get_rng_state()
    probe = watched.fit(
        lambda model, optimizer: LoraProbeMonitor(
            model, optimizer, every_n_steps=1, on_failure="raise", verbose=False, **case.intent
        )
    )
    report = probe.report
    assert not report.with_status("fail", "warn"), str(report)
    assert not report.internal_errors, report.internal_errors
    assert report.healthy is (True if case.judged else None)
    if not case.judged:
        assert {f.status for f in report.findings} == {"skipped"}
        assert all("lie in no tuner layer" in f.message for f in report.findings)
    expected = set() if not case.judged else (ESSENTIAL if case.lora else OF_ANY_TUNER) - case.but
    judged = {f.code: f"{f.status} at step {f.last_step}: {f.message}" for f in report.findings}
    passed = {f.code for f in report.with_status("pass") if f.last_step >= alone.steps - 2}
    assert expected <= passed, {code: judged.get(code) for code in sorted(expected - passed)}

    assert torch.equal(left, torch.get_rng_state()), "random numbers"
    theirs = dict(alone.model.named_parameters())
    for name, tensor in watched.model.named_parameters():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.requires_grad == theirs[name].requires_grad, name


def test_the_matrix_is_as_large_as_it_is_said_to_be() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)
