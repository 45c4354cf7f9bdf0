"""Two processes under Lightning's ddp, Accelerate and DeepSpeed, started by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(180)

COMMON = """
import json, os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, os.environ["TESTS"])
from support.training import adamw, batches, lora, trainable
folder = sys.argv[1]

def tell(fault, rank, report, error):
    found = [(f.code, f.status, f.step) for f in report.with_status("fail", "warn")]
    status = {f.code: f.status for f in report.findings}
    out = {"found": found, "error": type(error).__name__, "status": status, "internal": report.internal_errors,
           "text": str(error)[-800:]}
    open(f"{folder}/{fault}-{rank}.json", "w").write(json.dumps(out))
"""

LIGHTNING = """
import lightning.pytorch as pl
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

for fault in ("healthy", "fault"):
    pl.seed_everything(0, verbose=False)
    module = Unsynced() if fault == "fault" else Policy()
    probe, error = LoraProbe(verbose=False, every_n_steps=2, on_failure="stop"), None
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=6, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                         callbacks=[probe])
    try:
        trainer.fit(module, DataLoader(torch.cat(batches(12)), batch_size=2))
    except Exception as raised:
        error = raised
    tell(f"lightning-{fault}", trainer.global_rank, probe.report, error)
"""

ACCELERATE = """
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
    tell(f"accelerate-{fault}", accelerator.process_index, probe.report, error)
accelerator.end_training()
"""

DEEPSPEED = """
import deepspeed
import torch.distributed as dist
from support.processes import batch_of
from lora_probe_callbacks import LoraProbeMonitor

deepspeed.init_distributed("gloo")
rank = dist.get_rank()
for stage in (1, 2, 3):
    for held in ("engine", "module"):  # the Transformers Trainer hands out the module
        model = lora()
        wanted = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage},
                  "zero_allow_untested_optimizer": True}
        engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adamw(model), config=wanted)
        error, probe = None, LoraProbeMonitor(engine if held == "engine" else model, optimizer, verbose=False)
        try:
            with probe:
                for step in range(5):
                    ids = batch_of(rank, step)
                    engine.backward(engine(input_ids=ids, labels=ids).loss)
                    engine.step()
        except Exception as raised:
            error = raised
        tell(f"{held}-{stage}", rank, probe.report, error)
dist.destroy_process_group()
"""


def run(folder: Path, *sources: str, **environment: str) -> None:
    """Start a script with torchrun; both ranks tell of every run in it."""
    script = folder / "script.py"
    script.write_text("".join((COMMON, *sources)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "TESTS": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(
        [*command, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=140, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


def told(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Path(tmp_path_factory.mktemp("frameworks"))
    run(made, LIGHTNING, ACCELERATE)
    return made


@pytest.mark.parametrize("framework", ["lightning", "accelerate"])
def test_healthy_run_is_quiet(folder: Path, framework: str) -> None:
    for one in told(folder, f"{framework}-healthy"):
        assert (one["found"], one["error"], one["internal"]) == ([], "NoneType", []), one
        assert [one["status"][code] for code in ("LP701", "LP702", "LP703")] == ["pass"] * 3


# Lightning's callback sees gradients that may still be changed: the next step, with their effect, decides.
@pytest.mark.parametrize(
    ("framework", "step", "error"), [("lightning", 1, "NoneType"), ("accelerate", 0, "LoraProbeError")]
)
def test_gradients_that_are_not_reduced_are_the_one_finding(
    folder: Path, framework: str, step: int, error: str
) -> None:
    for one in told(folder, f"{framework}-fault"):
        assert (one["found"], one["internal"], one["error"]) == ([["LP702", "fail", step]], [], error), one


def test_zero_is_quiet_and_what_it_hides_is_not_passed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    run(tmp_path, DEEPSPEED, DS_ACCELERATOR="cpu")
    for name in (f"{held}-{stage}" for held in ("engine", "module") for stage in (1, 2, 3)):
        for one in told(tmp_path, name):
            assert (one["found"], one["error"], one["internal"]) == ([], "NoneType", []), (name, one)
            assert one["status"]["LP101"] == one["status"]["LP103"] == one["status"]["LP203"] == "pass"
            assert {one["status"][code] for code in ("LP201", "LP302", "LP401", "LP702", "LP703")} == {"skipped"}
