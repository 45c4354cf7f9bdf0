"""What it costs to score every example of a training step while it runs.

    python benchmarks/in_step.py                  on CUDA if there is one: Qwen2.5-1.5B's shape
    python benchmarks/in_step.py --device cpu     a tiny shape

Random weights, LoRA r = 16 on all linear layers in float32 as PEFT makes them, the base in bfloat16 or nf4 (float32 on
a CPU), the loss a mean over tokens. All ways take turns, so that a clock that drifts meets all of them; times are
medians, as multiples of the plain step of the same round. Memory is what tensors take at the peak beyond the model.
"norms" are without a direction; `per_prompt_projection` and the loop are passes of their own, on top of the step. Also
given is the relative error of the scores to the loop's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from projection import QWEN, RESULTS, TINY, build, distance, free, peak_memory, selected_logprobs, synchronize
from projection import Setting as Shape

from lora_probe_callbacks.estimators import per_example_scores, per_prompt_projection

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


class Setting(NamedTuple):
    """One block of the table."""

    shape: str
    base: str
    checkpointing: bool
    rows: int
    tokens: int


def settings(device: str) -> list[Setting]:
    """Return what is measured on a device."""
    if device == "cpu":
        return [Setting("tiny", "float32", kept, 16, 64) for kept in (False, True)]
    sizes = ((True, 32, 384), (False, 16, 384), (False, 8, 128))
    return [Setting("Qwen2.5-1.5B", base, *size) for base in ("bfloat16", "nf4") for size in sizes]


class Problem:
    """A model, a batch and directions."""

    def __init__(self, setting: Setting, device: str) -> None:
        torch.manual_seed(0)
        shape = Shape(setting.shape, setting.base, "sdpa", setting.checkpointing, setting.rows, 1, setting.tokens, ())
        self.model = build(shape, device)
        if setting.checkpointing:
            self.model.enable_input_require_grads()
        vocabulary = (QWEN if setting.shape != "tiny" else TINY)["vocab_size"]
        self.ids = torch.randint(1, vocabulary, (setting.rows, setting.tokens), device=device)
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.mus = [{n: 1e-3 * torch.randn_like(p) for n, p in trained.items()} for _ in range(8)]
        self.scores: torch.Tensor | None = None

    def losses(self, model: Any, rows: slice = slice(None)) -> torch.Tensor:
        """L [B], the mean over an example's tokens."""
        ids = self.ids[rows]
        return -selected_logprobs(model(input_ids=ids, use_cache=False).logits, ids).mean(-1)

    def step(self) -> None:
        """The plain step, without the optimizer."""
        self.model.zero_grad(set_to_none=True)
        self.losses(self.model).mean().backward()

    def scored(self, count: int, **options: Any) -> None:
        """The step inside the context."""
        with per_example_scores(self.model, self.mus[:count], self_check="never", **options) as scores:
            self.step()
        self.scores = None if scores.s is None else scores.s[0] * len(self.ids)

    def projected(self) -> None:
        """The step, and a pass of its own."""
        self.step()
        self.scores = per_prompt_projection(self.model, self.losses, self.mus[0], self_check="never")

    def looped(self) -> None:
        """The step, and a pass for every example."""
        self.step()
        parts = [slice(n, n + 1) for n in range(len(self.ids))]
        losses = [functools.partial(self.losses, rows=part) for part in parts]
        found = [per_prompt_projection(self.model, loss, self.mus[0], backend="loop") for loss in losses]
        self.scores = torch.cat(found)

    def ways(self) -> dict[str, Callable[[], None]]:
        """Return everything that is measured, by name."""
        return {
            "step": self.step,
            "1 direction": functools.partial(self.scored, 1),
            "8 directions": functools.partial(self.scored, 8),
            "norms": functools.partial(self.scored, 0, norms=True),
            "1 direction and norms": functools.partial(self.scored, 1, norms=True),
            "1 direction and Gram": functools.partial(self.scored, 1, gram=True),
            "1 direction per token": functools.partial(self.scored, 1, per_token=True),
            "per_prompt_projection": self.projected,
            "loop": self.looped,
        }


def measure(setting: Setting, device: str, rounds: int) -> list[dict[str, Any]]:
    """Return a row for every way."""
    problem = Problem(setting, device)
    ways = problem.ways()
    rows: dict[str, dict[str, Any]] = {}
    scores: dict[str, torch.Tensor] = {}
    for name, run in ways.items():
        free(device)
        problem.scores = None
        try:
            rows[name] = {"gib": peak_memory(run, device) / 2**30}
            if problem.scores is not None:
                scores[name] = problem.scores.double().cpu()
        except torch.OutOfMemoryError:
            rows[name] = {"failed": "out of memory"}
    alive = [name for name, row in rows.items() if "failed" not in row]
    times: dict[str, list[float]] = {name: [] for name in alive}
    free(device)
    for _ in range(rounds):
        for name in alive:
            synchronize(device)
            start = time.perf_counter()
            ways[name]()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    for name in alive:
        ratios = [taken / plain for taken, plain in zip(times[name], times["step"], strict=True)]
        rows[name] |= {"ms": statistics.median(times[name]) * 1e3, "times_the_step": statistics.median(ratios)}
        if name in scores and name != "loop" and "loop" in scores:
            rows[name]["error_to_loop"] = distance(scores[name], scores["loop"])
    return [{**setting._asdict(), "way": name, **row} for name, row in rows.items()]


def main() -> None:
    """Measure, print as it goes, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--base", choices=("bfloat16", "nf4"), help="only this base")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft asks transformers for renamed things
    cpu = options.device == "cpu"
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads" if cpu else torch.cuda.get_device_name()
    found: list[dict[str, Any]] = []
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    options.out.mkdir(exist_ok=True, parents=True)
    path = options.out / f"in-step-{'cpu' if cpu else name.lower().replace(' ', '-')}.json"
    for setting in settings(options.device):
        if options.base not in (None, setting.base):
            continue
        for row in measure(setting, options.device, options.rounds):
            found.append(row)
            print(json.dumps(row), flush=True)
        free(options.device)
        about = {"device": name, "date": datetime.now(UTC).date().isoformat(), "rounds": options.rounds}
        # After every setting: a machine that is taken away leaves what was measured.
        path.write_text(json.dumps({**about, "versions": versions, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
