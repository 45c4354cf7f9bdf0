"""What fails while the probe attaches: training goes on, it is said once, and the report is unproven."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from support.doors import fit_trainer
from support.training import Training, batches, fit_lightning, hooks_of_the_probe, lora, next_token_loss, trainable
from torch import Tensor, nn
from torch.optim import AdamW

from lora_probe_callbacks import LoraProbe, LoraProbeMonitor, LoraProbeTrainerCallback, ProbeReport


def as_in_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on PEFT's layers have no attribute of a name that the probe reads."""
    for kind in (BaseTunerLayer, LoraLayer):
        monkeypatch.delattr(kind, "adapter_layer_names")


def assert_unproven(report: ProbeReport, told: str) -> None:
    assert report.healthy is None
    assert len(report.internal_errors) == 1
    assert "AttributeError" in report.why_unproven()[0]
    assert told.count("could not judge, training goes on: AttributeError") == 1
    skipped = report.with_status("skipped")
    assert len(skipped) == len(report.findings) > 50
    assert "while attaching under {" in skipped[0].message
    assert "'peft': '" in skipped[0].message


def test_monitor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = lora()
    as_in_another_release(monkeypatch)
    optimizer = AdamW(trainable(model))
    with LoraProbeMonitor(model, optimizer) as probe:
        for number, batch in enumerate(batches(3)):
            next_token_loss(model, batch, number).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_unproven(probe.report, " ".join(capsys.readouterr().err.split()))
    assert not list(hooks_of_the_probe(model))


def test_trainer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    probe = LoraProbeTrainerCallback()
    run = Training(lora())
    as_in_another_release(monkeypatch)
    fit_trainer(run, probe, 3)
    assert_unproven(probe.report, " ".join(capsys.readouterr().err.split()))


def test_lightning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    probe = LoraProbe()
    run = Training(lora())
    as_in_another_release(monkeypatch)
    fit_lightning(run, probe, 3)
    assert_unproven(probe.report, " ".join(capsys.readouterr().err.split()))


class LoRALinear(nn.Module):
    """Built as torchtune builds it (0.6, torchtune/modules/peft/lora.py): no layer of PEFT's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.lora_a = nn.Linear(4, 2, bias=False)
        self.lora_b = nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + self.lora_b(self.lora_a(x))


def test_lora_of_another_library_is_named_and_not_judged(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(LoRALinear())
    optimizer = AdamW(trainable(model))
    with LoraProbeMonitor(model, optimizer) as probe:
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    assert probe.report.healthy is None
    assert "LoRALinear is LoRA of its own, not of PEFT" in probe.report.open_questions[0]
    assert " ".join(capsys.readouterr().err.split()).count("LoRALinear is LoRA of its own") == 1
