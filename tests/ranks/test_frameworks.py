"""Two processes under Lightning's ddp and under Accelerate, started as their users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(150)

COMMON = """
import json, os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, os.environ["TESTS"])
from training import adamw, batches, lora, trainable
folder = sys.argv[1]

def tell(fault, rank, report, error):
    found = [(f.code, f.status, f.step) for f in report.with_status("fail", "warn")]
    status = {f.code: f.status for f in report.findings}
    out = {"found": found, "error": type(error).__name__, "status": status, "internal": report.internal_errors,
           "text": str(error)[-800:]}
    open(f"{folder}/{fault}-{rank}.json", "w").write(json.dumps(out))
"""

LIGHTNING = (
    COMMON
    + """
import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader
from lora_probe_callbacks import LoraProbe

class Policy(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = lora()
    def training_step(self, batch, index):
        return self.model(input_ids=batch, labels=batch).loss
    def configure_optimizers(self):
        return adamw(self)

class Unsynced(Policy):
    def on_train_batch_start(self, batch, index):
        self.trainer.strategy.model.require_backward_grad_sync = False  # what no_sync() sets

if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    fault = sys.argv[2]  # one fit a script: Lightning starts its second process anew at every fit
    module = Unsynced() if fault == "fault" else Policy()
    probe, error = LoraProbe(verbose=False, every_n_steps=2, on_failure="stop"), None
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=DDPStrategy(), max_steps=6, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                         callbacks=[probe])
    try:
        trainer.fit(module, DataLoader(torch.cat(batches(12)), batch_size=2))
    except Exception as raised:
        error = raised
    tell(fault, rank, probe.report, error)
"""
)

ACCELERATE = (
    COMMON
    + """
from accelerate import Accelerator
from lora_probe_callbacks import LoraProbeMonitor

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
for fault in ("healthy", "fault"):
    model = lora()
    model, optimizer = accelerator.prepare(model, adamw(model))
    error = None
    probe = LoraProbeMonitor(model, optimizer, accelerator=accelerator, verbose=False, log=lambda m, s: None)
    called = accelerator.unwrap_model(model) if fault == "fault" else model
    try:
        with probe:
            for ids in batches(24)[accelerator.process_index :: 2]:
                with accelerator.accumulate(model):
                    accelerator.backward(called(input_ids=ids, labels=ids).loss)
                    optimizer.step()
                    optimizer.zero_grad()
    except Exception as raised:
        error = raised
    tell(fault, accelerator.process_index, probe.report, error)
accelerator.end_training()
"""
)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(tmp_path: Path, source: str, *launcher: str, faults: tuple[str, ...] = ("",)) -> dict[str, list[Any]]:
    """Start a script, once for each fault that it takes as an argument, and read what both ranks have told."""
    script = tmp_path / "script.py"
    script.write_text(source)
    environment = {**os.environ, "TESTS": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    errors = ""
    for fault in faults:
        command = [sys.executable, *launcher, str(script), str(tmp_path), fault]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=70, check=False)
        errors += result.stderr[-3000:]
    paths = {fault: [tmp_path / f"{fault}-{rank}.json" for rank in range(2)] for fault in ("healthy", "fault")}
    assert all(path.exists() for both in paths.values() for path in both), errors
    return {fault: [json.loads(path.read_text()) for path in both] for fault, both in paths.items()}


def assert_found_where_it_is(outcomes: dict[str, list[dict[str, Any]]], step: int, error: str) -> None:
    for one in outcomes["healthy"]:
        assert (one["found"], one["error"], one["internal"]) == ([], "NoneType", []), one
        assert [one["status"][code] for code in ("LP701", "LP702", "LP703")] == ["pass"] * 3
    for one in outcomes["fault"]:
        assert (one["found"], one["internal"]) == ([["LP702", "fail", step]], []), one
        assert one["error"] == error, one


def test_lightning_ddp(tmp_path: Path) -> None:
    """Its callback sees gradients that may still be changed: the next step, with their effect, decides."""
    assert_found_where_it_is(run(tmp_path, LIGHTNING, faults=("healthy", "fault")), step=1, error="NoneType")


def test_accelerate_under_torchrun(tmp_path: Path) -> None:
    assert_found_where_it_is(run(tmp_path, ACCELERATE, *TORCHRUN), step=0, error="LoraProbeError")
