"""What the probe takes: the same training with and without it, alternating in one run.

    python benchmarks/overhead.py --shape tiny
    python benchmarks/overhead.py --shape qwen2.5-1.5b --device cuda

Prints a table and writes a JSON file with device and versions under ``benchmarks/results``. Times are
medians of single steps; ratios are of blocks that ran next to each other, since machines drift.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from lora_probe_callbacks import LoraProbeMonitor

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4},
        "heads": (4, 2),
        "batch": (4, 32),
        "rank": 8,
    },
    "qwen2.5-1.5b": {
        "model": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
        "heads": (12, 2),
        "batch": (32, 384),
        "rank": 16,
    },
}


class Training:
    """One model, one optimizer, one batch; a step is a forward, a backward and an update."""

    def __init__(self, shape: dict[str, Any], device: str) -> None:
        torch.manual_seed(0)
        heads, groups = shape["heads"]
        config = Qwen2Config(
            **shape["model"],
            num_attention_heads=heads,
            num_key_value_heads=groups,
            tie_word_embeddings=True,
            use_cache=False,
        )
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            base = Qwen2ForCausalLM(config).to(dtype)
        self.model = get_peft_model(base, LoraConfig(r=shape["rank"], target_modules="all-linear")).to(device)
        if device == "cuda":  # 32 x 384 sequences do not fit without it on 80 GB, logits included
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.tensors = len(trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.ids = torch.randint(0, shape["model"]["vocab_size"], shape["batch"], device=device)
        self.device = device

    def steps(self, count: int) -> list[float]:
        """Run ``count`` steps; milliseconds of each."""
        times = []
        for _ in range(count):
            self._wait()
            began = time.perf_counter()
            hidden = self.model.get_base_model().model(input_ids=self.ids)[0]
            # A scalar that needs no [32, 384, 151936] logits: the probe's cost does not depend on the head.
            hidden.float().pow(2).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._wait()
            times.append((time.perf_counter() - began) * 1e3)
        return times

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(training: Training, blocks: int, steps: int) -> dict[str, Any]:
    """Alternate blocks of plain steps, of steps probed every time, and of steps between probes."""
    times: dict[str, list[float]] = {"plain": [], "every step": [], "between probes": []}
    training.steps(3)
    for _ in range(blocks):
        times["plain"].append(statistics.median(training.steps(steps)))
        with LoraProbeMonitor(training.model, training.optimizer, every_n_steps=1, verbose=False) as probe:
            training.steps(4)
            times["every step"].append(statistics.median(training.steps(steps)))
        healthy = probe.report.healthy and not probe.report.internal_errors
        with LoraProbeMonitor(training.model, training.optimizer, every_n_steps=10**6, verbose=False):
            training.steps(5)
            times["between probes"].append(statistics.median(training.steps(steps)))
    rows = {}
    for name, values in times.items():
        ratios = [v / p for v, p in zip(values, times["plain"], strict=True)]
        rows[name] = {
            "ms": round(statistics.median(values), 3),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_min": round(min(ratios), 4),
            "ratio_max": round(max(ratios), 4),
        }
    extra = rows["every step"]["ms"] - rows["plain"]["ms"]
    default = 1 + extra / 50 / rows["plain"]["ms"]
    return {
        "rows": rows,
        "ms_per_probed_step": round(extra, 3),
        "default_cadence": round(default, 5),
        "healthy": healthy,
    }


def main() -> None:
    """Measure one shape on one device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    training = Training(SHAPES[options.shape], options.device)
    result = measure(training, options.blocks, options.steps)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU, 1 thread"
    result |= {
        "shape": options.shape,
        "device": name,
        "adapter_tensors": training.tensors,
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "peft", "transformers")},
    }
    for row, values in result["rows"].items():
        spread = f"[{values['ratio_min']:.4f}, {values['ratio_max']:.4f}]"
        print(f"{row:<16}{values['ms']:>10.2f} ms   x {values['ratio']:.4f}  {spread}")
    print(f"probed step +{result['ms_per_probed_step']:.2f} ms; every 50 steps: x {result['default_cadence']:.5f}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"overhead-{options.shape}-{options.device}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
