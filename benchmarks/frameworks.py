"""Unmodified command lines of fine-tuning frameworks, alone and under ``lora-probe run``.

Needs a package index and some GB of disk; run by ``make frameworks``, outside CI. A tiny Llama, made from a
configuration with a tokenizer of bytes, is fine-tuned on a CPU four times for each framework: alone; under the runner
(the losses must be the same to the last digit, and the run healthy); with a learning rate of 0 (LP208); and merged in
the middle (LP103). Writes ``benchmarks/results/frameworks.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "frameworks.json"
TORCH = "torch==2.13.0"
STEPS = 6
# Framework -> (Python it needs, what is installed).
PINS = {
    "llamafactory": ("python3.11", ("llamafactory==0.9.5",)),
    "ms-swift": ("python3.11", ("ms-swift==4.6.0",)),
    "axolotl": ("python3.12", ("axolotl==0.21.0",)),
}
SHOWN = ("torch", "transformers", "peft", "trl", "accelerate")

MODEL = """
import json, sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
import torch

folder = sys.argv[1]
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters])}
bare = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
tokenizer.save_pretrained(folder)
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
config = LlamaConfig(vocab_size=len(words), bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
LlamaForCausalLM(config).save_pretrained(folder)
rows = [{"instruction": f"add {i} and {i + 1}", "input": "", "output": str(2 * i + 1)} for i in range(64)]
json.dump(rows, open(folder + "/rows.json", "w"))
json.dump({"rows": {"file_name": "rows.json"}}, open(folder + "/dataset_info.json", "w"))
"""

# Put in front of PYTHONPATH for the fault: the adapter is merged before the forward of the fourth step.
MERGE = """
import sys
from importlib.machinery import PathFinder

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "transformers.trainer":
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            step = module.Trainer.training_step
            def merged(self, model, *args, **kwargs):
                if self.state.global_step == 3:
                    next(m for m in model.modules() if hasattr(m, "merge_adapter")).merge_adapter()
                return step(self, model, *args, **kwargs)
            module.Trainer.training_step = merged
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def llamafactory(folder: Path, base: Path, out: Path, rate: float) -> list[str]:
    """The command for LLaMA-Factory."""
    keys = {
        "model_name_or_path": str(base), "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 4,
        "lora_target": "all", "dataset": "rows", "dataset_dir": str(base), "template": "default", "cutoff_len": 512,
        "output_dir": str(out), "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": rate,
        "max_steps": STEPS, "overwrite_output_dir": True, "seed": 1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    config = out.with_suffix(".yaml")
    config.write_text(json.dumps(keys))  # JSON is YAML
    return [str(folder / "bin" / "llamafactory-cli"), "train", str(config)]


def swift(folder: Path, base: Path, out: Path, rate: float) -> list[str]:
    """The command for ms-swift."""
    options = {
        "model": base, "model_type": "llama", "template": "default", "tuner_type": "lora", "lora_rank": 4,
        "dataset": base / "rows.json", "output_dir": out, "logging_steps": 1, "save_strategy": "no",
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": rate,
        "max_steps": STEPS, "seed": 1, "torch_dtype": "float32", "lr_scheduler_type": "constant",
        "use_cpu": "true", "report_to": "none", "eval_strategy": "no", "dataset_num_proc": 1,
        "dataloader_num_workers": 0, "max_length": 512, "split_dataset_ratio": 0, "gradient_checkpointing": "false",
    }  # fmt: skip
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [str(folder / "bin" / "swift"), "sft", *words]


def axolotl(folder: Path, base: Path, out: Path, rate: float) -> list[str]:
    """The command for axolotl."""
    keys = {
        "base_model": str(base), "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True,
        "datasets": [{"path": str(base / "rows.json"), "ds_type": "json", "type": "alpaca"}], "output_dir": str(out),
        "sequence_len": 512, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": rate or 1e-30,
        "max_steps": STEPS, "optimizer": "adamw_torch", "lr_scheduler": "constant", "logging_steps": 1, "seed": 1,
        "bf16": False, "fp16": False, "tf32": False, "save_strategy": "no", "use_cpu": True, "val_set_size": 0,
        "dataset_prepared_path": str(out) + "-data", "dataset_num_proc": 1, "special_tokens": {"pad_token": "<pad>"},
    }  # fmt: skip
    config = out.with_suffix(".yaml")
    config.write_text(json.dumps(keys))
    return [str(folder / "bin" / "axolotl"), "train", str(config)]


COMMANDS = {"llamafactory": llamafactory, "ms-swift": swift, "axolotl": axolotl}


def made(folder: Path, interpreter: str, pins: Sequence[str]) -> Path:
    """An environment with a framework; made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", TORCH, *pins], check=True)
        without_cuda(python)
    return python


def without_cuda(python: Path) -> None:
    """Take away what an index holds for CUDA alone, and what cannot be imported beside a torch for CPUs."""
    pip = [str(python), "-m", "pip"]
    subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "torchcodec"], check=True)
    for compiled in python.parent.parent.glob("lib/python*/site-packages/torchaudio/lib"):
        shutil.rmtree(compiled)  # LLaMA-Factory imports torchaudio, which is content without; text needs none of it


def installed_beside(python: Path) -> dict[str, list[str]]:
    """Install this package beside a framework.

    Returns:
        What the resolver changed of what was there: name to the versions before and after.
    """
    pip = [str(python), "-m", "pip"]
    listed = subprocess.run([*pip, "list", "--format", "json"], check=True, capture_output=True, text=True).stdout
    before = {canonical(row["name"]): row["version"] for row in json.loads(listed)}
    install = [*pip, "install", "-q", str(ROOT)]
    plan = subprocess.run([*install, "--dry-run", "--report", "-"], check=True, capture_output=True, text=True).stdout
    planned = {canonical(i["metadata"]["name"]): i["metadata"]["version"] for i in json.loads(plan)["install"]}
    subprocess.run(install, check=True)
    return {n: [before[n], version] for n, version in planned.items() if n in before and n != "lora-probe-callbacks"}


def canonical(name: str) -> str:
    """The name of a distribution as an index spells it."""
    return name.lower().replace("_", "-")


def trained(command: Sequence[str], folder: Path, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command with this checkout's package and the environment's programs."""
    paths = [str(path) for path in (first, ROOT) if path is not None]
    programs = os.pathsep.join((str(folder / "bin"), os.environ["PATH"]))
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true", "CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1"}
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "PATH": programs}
    return subprocess.run(command, env={**os.environ, **offline, **threads}, capture_output=True, text=True)


def losses(output: Path) -> list[str]:
    """The losses of a run as the trainer's state or log holds them."""
    for path in sorted(output.rglob("trainer_log.jsonl")) + sorted(output.rglob("logging.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [repr(row["loss"]) for row in rows if "loss" in row]
    for path in sorted(output.rglob("trainer_state.json")):
        return [repr(row["loss"]) for row in json.loads(path.read_text())["log_history"] if "loss" in row]
    return []


def measured(name: str, folder: Path) -> dict[str, Any]:
    """The four runs of one framework."""
    python = made(folder, *PINS[name])
    changed = installed_beside(python)
    runner = [str(python), "-W", "ignore", "-c", "from lora_probe_callbacks.cli import app; app()", "run"]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        base = place / "base"
        base.mkdir()
        subprocess.run([str(python), "-c", MODEL, str(base)], check=True, capture_output=True)
        fault = place / "fault"
        fault.mkdir()
        (fault / "sitecustomize.py").write_text(MERGE)

        def run(out: str, rate: float, *, probe: bool, first: Path | None = None) -> dict[str, Any]:
            command = COMMANDS[name](folder, base, place / out, rate)
            options = ["--every-n-steps", "1", "--strict", "--"]
            done = trained([*runner, *options, *command] if probe else command, folder, first)
            said = [s for s in done.stderr.splitlines() if s.startswith("lora-probe run: ")]
            row = {"code": done.returncode, "said": said, "losses": losses(place / out)}
            return row if row["losses"] else {**row, "end of stderr": done.stderr[-1500:]}

        alone, probed = run("alone", 1e-3, probe=False), run("probed", 1e-3, probe=True)
        return {
            "versions": versions(python, PINS[name][1][0].partition("==")[0]),
            "changed by installing this package": changed,
            "losses are the same": alone["losses"] == probed["losses"] != [],
            "alone": alone,
            "probed": probed,
            "learning rate 0": run("dead", 0.0, probe=True),
            "merged": run("merged", 1e-3, probe=True, first=fault),
        }


def versions(python: Path, framework: str) -> dict[str, str]:
    """What is installed in an environment."""
    names = (*SHOWN, framework)
    program = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    return dict(json.loads(subprocess.run([str(python), "-c", program], capture_output=True, text=True).stdout))


def main() -> None:
    """Measure the frameworks that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PINS, action="append", help="these only; the others' results stay")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "frameworks", help="of the environments")
    given = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in given.only or PINS:
        result[name] = measured(name, given.folder / name)
        print(name, json.dumps(result[name], indent=2))
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
