"""``lora-probe run`` on scripts that know nothing of it, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lora_probe_callbacks

ROOT = Path(lora_probe_callbacks.__file__).parent.parent
RUN = [sys.executable, "-W", "ignore", "-c", "from lora_probe_callbacks.cli import app; app()", "run"]

HEAD = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
torch.set_num_threads(1)
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
rows = torch.randint(32, (24, 6))
rate = 0.0 if "dead" in sys.argv else 1e-2
"""

TRAINER = (
    HEAD
    + """
from transformers import Trainer, TrainingArguments

class Overrides(Trainer):
    def train(self, *args, **kwargs):
        return super().train(*args, **kwargs)

class OwnLoop(Trainer):
    def train(self):
        loader = self.get_train_dataloader()
        model, optimizer = self.accelerator.prepare(self.model, self.create_optimizer())
        for _ in range(2):
            for batch in loader:
                self.accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()

kind = {"overrides": Overrides, "ownloop": OwnLoop}.get(sys.argv[-1], Trainer)
arguments = TrainingArguments(
    sys.argv[1], max_steps=6, learning_rate=rate, per_device_train_batch_size=4, report_to=[], save_strategy="no",
    use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
)
trainer = kind(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
for _ in range(2 if "twice" in sys.argv else 1):
    trainer.train()
print("sum", sum(p.double().sum().item() for p in model.parameters()).hex())
"""
)

ACCELERATE = (
    HEAD
    + """
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
model.enable_input_require_grads()  # else a merged adapter makes backward() raise
model = accelerator.prepare(model)
optimizer = accelerator.prepare(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
for step in range(8):
    if step == 5 and "merged" in sys.argv:
        accelerator.unwrap_model(model).merge_adapter()
    batch = rows[4 * (step % 6) :][:4]
    accelerator.backward(model(input_ids=batch, labels=batch).loss)
    optimizer.step()
    optimizer.zero_grad()
print("sum", sum(p.double().sum().item() for p in model.parameters()).hex())
if "ended" in sys.argv:
    accelerator.end_training()
if "raises" in sys.argv:
    raise RuntimeError("the script's own")
"""
)

LIGHTNING = (
    HEAD
    + """
import lightning.pytorch as pl

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model
    def training_step(self, batch, number):
        return self.model(input_ids=batch, labels=batch).loss
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=rate)

trainer = pl.Trainer(max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Module(), torch.utils.data.DataLoader(rows, batch_size=4))
print("sum", sum(p.double().sum().item() for p in model.parameters()).hex())
"""
)


def script(folder: Path, text: str, name: str = "train.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def started(command: list[str], folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, (extra.pop("PYTHONPATH", ""), str(ROOT))))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **extra, "PYTHONPATH": paths}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def probed(folder: Path, *command: str, options: tuple[str, ...] = ("--strict",), **extra: str):
    return started([*RUN, "--every-n-steps", "1", *options, "--", *command], folder, **extra)


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("lora-probe run: ")]


@pytest.mark.parametrize(
    ("text", "arguments", "lines"),
    [
        (TRAINER, ["out"], ["attached to Trainer: healthy, 6 steps judged"]),
        (TRAINER, ["out", "twice"], ["attached to Trainer: healthy, 6 steps judged (2 times)"]),
        (TRAINER, ["out", "overrides"], ["attached to Overrides: healthy, 6 steps judged"]),
        (TRAINER, ["out", "ownloop"], ["attached to Accelerator with PeftModel: healthy, 12 steps judged"]),
        (ACCELERATE, [], ["attached to Accelerator with PeftModel: healthy, 8 steps judged"]),
        (ACCELERATE, ["ended"], ["attached to Accelerator with PeftModel: healthy, 8 steps judged"]),
        (LIGHTNING, [], ["attached to Trainer of Module: healthy, 6 steps judged"]),
    ],
    ids=["trainer", "twice", "overrides", "ownloop", "accelerate", "ended", "lightning"],
)
def test_an_unchanged_script_is_judged_and_trains_the_same(
    tmp_path: Path, text: str, arguments: list[str], lines: list[str]
) -> None:
    path = script(tmp_path, text)
    alone = started([sys.executable, str(path), *arguments], tmp_path)
    with_it = probed(tmp_path, sys.executable, str(path), *arguments)
    assert alone.returncode == 0, alone.stderr
    assert with_it.returncode == 0, with_it.stderr
    sums = [[line for line in done.stdout.splitlines() if line.startswith("sum")] for done in (alone, with_it)]
    assert sums[0] == sums[1] != []
    assert said(with_it) == [f"lora-probe run: {line}" for line in lines]


@pytest.mark.parametrize(
    ("text", "arguments", "code"),
    [(TRAINER, ["out", "dead"], "LP208"), (LIGHTNING, ["dead"], "LP208"), (ACCELERATE, ["merged"], "LP103")],
    ids=["trainer", "lightning", "accelerate"],
)
def test_a_fault_is_reported_and_decides_the_code_only_if_asked(
    tmp_path: Path, text: str, arguments: list[str], code: str
) -> None:
    path = script(tmp_path, text)
    strict = probed(tmp_path, "train.py", *arguments)
    assert strict.returncode == 1, strict.stderr
    assert any("unhealthy" in line and code in line for line in said(strict)), strict.stderr
    assert "sum" in strict.stdout  # on_failure is "warn": the script ran to its end
    lenient = probed(tmp_path, sys.executable, str(path), *arguments, options=())
    assert lenient.returncode == 0
    assert said(lenient) == said(strict)


def test_a_failed_check_raises_in_the_script_if_asked(tmp_path: Path) -> None:
    script(tmp_path, TRAINER)
    done = probed(tmp_path, "train.py", "out", "dead", options=("--on-failure", "raise"))
    assert done.returncode == 1
    assert "LoraProbeError" in done.stderr
    assert "sum" not in done.stdout


def test_the_exit_code_of_a_script_that_fails_is_its_own(tmp_path: Path) -> None:
    script(tmp_path, ACCELERATE)
    done = probed(tmp_path, "train.py", "raises", options=())
    assert done.returncode == 1
    assert "the script's own" in done.stderr
    assert probed(tmp_path, sys.executable, "-c", "raise SystemExit(7)").returncode == 7
    killed = probed(tmp_path, sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == 128 + 9


def test_attached_nowhere_is_said_loudly(tmp_path: Path) -> None:
    done = probed(tmp_path, sys.executable, "-c", "print('trains nothing')", options=())
    assert done.returncode == 0
    assert "attached nowhere" in said(done)[0]
    assert "NOTHING WAS JUDGED" in said(done)[0]
    assert probed(tmp_path, sys.executable, "-c", "pass").returncode == 2


def test_a_model_without_an_adapter_trains_on(tmp_path: Path) -> None:
    script(tmp_path, TRAINER.replace("get_peft_model(", "(lambda base, _: base)("))
    done = probed(tmp_path, "train.py", "out", options=())
    assert done.returncode == 0, done.stderr
    assert "sum" in done.stdout
    assert len(said(done)) == 2  # once when it happens, once at the end
    assert all("could not attach: ValueError: found no PEFT adapter" in line for line in said(done))


@pytest.mark.parametrize(
    ("text", "place", "name"),
    [
        (
            TRAINER,
            ("train_dataset=[", "callbacks=[LoraProbeTrainerCallback(every_n_steps=1)], train_dataset=["),
            "Trainer",
        ),
        (LIGHTNING, ("logger=False,", "logger=False, callbacks=[LoraProbe(every_n_steps=1)],"), "Trainer of Module"),
    ],
    ids=["trainer", "lightning"],
)
def test_a_probe_of_the_script_itself_is_the_one_that_judges(
    tmp_path: Path, text: str, place: tuple[str, str], name: str
) -> None:
    both = "from lora_probe_callbacks import LoraProbe, LoraProbeTrainerCallback\n"
    script(tmp_path, both + text.replace(*place))
    done = probed(tmp_path, "train.py", "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("LoRA probe: healthy") == 1
    assert said(done) == [f"lora-probe run: attached to {name}: healthy, 6 steps judged"]


def test_two_processes_of_torchrun(tmp_path: Path) -> None:
    script(tmp_path, TRAINER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = probed(tmp_path, *launch, "train.py", "out")
    assert done.returncode == 0, done.stderr
    assert said(done) == ["lora-probe run: attached to Trainer: healthy, 6 steps judged (2 times)"]


def test_a_module_and_the_record(tmp_path: Path) -> None:
    script(tmp_path, TRAINER, "training.py")
    done = probed(tmp_path, "-m", "training", "out", options=("--record", "probe.jsonl"))
    assert done.returncode == 0, done.stderr
    assert "healthy" in (tmp_path / "probe.jsonl").read_text()


def test_the_sitecustomize_of_the_environment_runs_too(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    script(tmp_path / "site", "print('of the environment')", "sitecustomize.py")
    done = probed(tmp_path, sys.executable, "-c", "pass", options=(), PYTHONPATH=str(tmp_path / "site"))
    assert done.stdout == "of the environment\n" * 2  # of this command and of what it starts


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    done = probed(tmp_path, "no-such-program")
    assert done.returncode == 2
    assert "no such program" in done.stderr
