"""What reading a save back costs, beside the save itself.

    python benchmarks/checkpoints.py [--shape tiny|1.5b] [--saves 15]

An adapter is saved as PEFT and as the Trainer do, again and again; the probe samples it, reads the file back,
takes the fingerprint that goes into the checkpoint, and judges. Nothing is trained in between. Medians of CPU time,
user and system: what a save waits for the disk is left out, which makes the ratios larger than they are on the clock.
Writes ``benchmarks/results/checkpoints-cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lora_probe_callbacks import LoraProbeMonitor

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    # Qwen2.5-1.5B's blocks; its vocabulary is not adapted and left out
    "1.5b": {
        "vocab_size": 1024,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
LIMIT = 0.05


def model(shape: str) -> PeftModel:
    """A Llama of random weights with LoRA r=16 on all linears."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    base = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], use_cache=False))
    torch.set_default_dtype(before)
    adapted = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.02)
    return adapted


def seconds(work: Callable[[], object]) -> float:
    """CPU time that it takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measured(shape: str, saves: int) -> dict[str, Any]:
    """Times of the parts, in milliseconds, and what they come to beside the saves."""
    adapted = model(shape)
    tensors = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tensors, lr=1e-4)
    for tensor in tensors:
        tensor.grad = torch.full_like(tensor, 1e-3)
    optimizer.step()
    probe = LoraProbeMonitor(adapted, optimizer, verbose=False, on_failure="warn")
    session = probe._session
    names = ("save_pretrained", "optimizer.pt", "sample", "read", "fingerprint", "judge")
    times: dict[str, list[float]] = {name: [] for name in names}
    with probe, tempfile.TemporaryDirectory() as place:
        start = seconds(lambda: session.files.begin(session._targets, session._collector))
        for number in range(saves + 2):
            folder = Path(place) / str(number % 2)
            row = [
                seconds(lambda: adapted.save_pretrained(folder)),  # noqa: B023
                seconds(lambda: torch.save(optimizer.state_dict(), folder / "optimizer.pt")),  # noqa: B023
                seconds(lambda: session.files.announced(folder)),  # noqa: B023
                seconds(session.files.written),
                seconds(session.files.state_dict),
                seconds(
                    lambda: session._decisions.decide_on_files(session._collector.checkpoints.take())
                ),  # the case of a save between two probed steps
            ]
            if number >= 2:
                for name, value in zip(names, row, strict=True):
                    times[name].append(value)
        judged = {f.code: f.status for f in probe.report.findings if f.code.startswith("LP80")}
        size = (folder / "adapter_model.safetensors").stat().st_size
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    check = medians["sample"] + medians["read"] + medians["judge"]
    adapter, checkpoint = medians["save_pretrained"], medians["save_pretrained"] + medians["optimizer.pt"]
    return {
        "shape": shape,
        "tensors": len(tensors),
        "mebibytes": round(size / 2**20, 3),
        "saves": saves,
        "ms": {name: round(value, 3) for name, value in medians.items()},
        "start_ms": round(1e3 * start, 3),
        "check_over_adapter_save": round(check / adapter, 4),
        "check_and_fingerprint_over_checkpoint": round((check + medians["fingerprint"]) / checkpoint, 4),
        "judged": judged,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--saves", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(shape, options.saves) for shape in (SHAPES if options.shape == "all" else [options.shape])]
    for row in rows:
        print(json.dumps(row, indent=1))
    versions = {module.__name__: module.__version__ for module in (torch, peft, transformers)}
    result = {
        "device": "cpu",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": versions,
        "limit": LIMIT,
        "rows": rows,
    }
    (options.out / "checkpoints-cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
