"""Each door needs its own framework only: run in environments in which the others are not installed."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

import lora_probe_callbacks

ROOT = Path(lora_probe_callbacks.__file__).parent.parent
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_utilities", "torchmetrics")
OTHERS = ("bitsandbytes", "matplotlib", "trl", "wandb", "tensorboard")

MODEL = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=2, target_modules=["q_proj"]))
rows = torch.randint(32, (20, 6))
"""
MONITOR = """
from lora_probe_callbacks import LoraProbeMonitor
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
with LoraProbeMonitor(model, optimizer, every_n_steps=1) as probe:
    for row in rows.split(4):
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
"""
TRAINER = """
import tempfile
from transformers import Trainer, TrainingArguments
from lora_probe_callbacks import LoraProbeTrainerCallback
probe = LoraProbeTrainerCallback(every_n_steps=1)
arguments = TrainingArguments(
    tempfile.mkdtemp(), max_steps=5, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True,
    learning_rate=1e-2,
)
data = [{"input_ids": row, "labels": row} for row in rows]
Trainer(model=model, args=arguments, train_dataset=data, callbacks=[probe]).train()
"""
LIGHTNING_DOOR = """
import lightning.pytorch as pl
from lora_probe_callbacks import LoraProbe
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model
    def training_step(self, batch, number):
        return self.model(input_ids=batch, labels=batch).loss
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
probe = LoraProbe(every_n_steps=1)
trainer = pl.Trainer(max_steps=5, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[probe])
trainer.fit(Module(), torch.utils.data.DataLoader(rows, batch_size=4))
"""
COMMAND = """
from typer.testing import CliRunner
from lora_probe_callbacks.cli import app
assert CliRunner().invoke(app, ["checks"]).exit_code == 0
assert CliRunner().invoke(app, ["run", "--help"]).exit_code == 0
"""
HEALTHY = "\nassert probe.report.healthy is True, str(probe.report)\n"


def without(folder: Path, absent: tuple[str, ...]) -> Path:
    """The Python of an environment that holds what this one holds, but for some packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    there = next((folder / "lib").glob("python*/site-packages"))
    for source in site.getsitepackages():
        for entry in Path(source).iterdir():
            name = entry.name.lower().replace("-", "_")
            if any(name == a or name.startswith((f"{a}-", f"{a}_", f"{a}.")) for a in absent):
                continue
            if entry.suffix != ".pth" and not (there / entry.name).exists():
                (there / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


@pytest.mark.parametrize(
    ("absent", "program"),
    [
        ((*LIGHTNING, *OTHERS), MODEL + MONITOR + HEALTHY),
        ((*LIGHTNING, *OTHERS), MODEL + TRAINER + HEALTHY),
        (OTHERS, MODEL + LIGHTNING_DOOR + HEALTHY),
        ((*LIGHTNING, *OTHERS), COMMAND),
    ],
    ids=["monitor", "trainer", "lightning", "command"],
)
def test_door_without_the_other_frameworks(tmp_path: Path, absent: tuple[str, ...], program: str) -> None:
    python = without(tmp_path / "venv", absent)
    gone = f"import importlib.util as u\nassert not [a for a in {absent!r} if u.find_spec(a) is not None]\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(python), "-W", "ignore", "-c", gone + program],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
