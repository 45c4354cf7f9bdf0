"""Time and memory of s_n = <grad L_n, mu> by every backend, next to the plain training step.

    python benchmarks/projection.py                  on CUDA if there is one: Qwen2.5-1.5B's shape
    python benchmarks/projection.py --device cpu     a tiny shape
    python benchmarks/table.py                       the tables of all results

Weights are random; LoRA r = 16 on all linear layers, its tensors in float32 as PEFT makes them,
the base in bfloat16 or nf4 (float32 on a CPU). Times are medians of three after two warm-ups, all
in one process. Memory is what tensors take at the peak beyond the model and its adapter. The
loop runs the rows of one prompt at a time, which is its best way.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import itertools
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM

from lora_probe_callbacks.estimators import per_prompt_projection

RESULTS = Path(__file__).parent / "results"
REPEATS = 3
CHUNK = 1024  # tokens whose logits are held in float32 at once
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")

QWEN = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
TINY = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}


class Setting(NamedTuple):
    """One block of the table."""

    shape: str
    base: str
    attention: str
    checkpointing: bool
    prompts: int
    responses: int
    tokens: int
    backends: tuple[str, ...]


FAST = ("step", "doubled_rank", "loop")
EVERY = (*FAST, "alpha", "jvp")


def settings(device: str) -> list[Setting]:
    """Return what is measured on a device."""
    if device == "cpu":
        tiny = functools.partial(Setting, "tiny", prompts=8, responses=2, tokens=64)
        return [
            tiny("float32", "sdpa", False, backends=EVERY),
            tiny("float32", "sdpa", True, backends=FAST),
            tiny("float32", "eager", False, backends=EVERY),
            tiny("nf4", "eager", False, backends=EVERY),
        ]
    qwen = functools.partial(Setting, "Qwen2.5-1.5B", prompts=8, responses=4, tokens=384)
    return [
        *(qwen(base, "sdpa", kept, backends=EVERY) for base in ("bfloat16", "nf4") for kept in (False, True)),
        qwen("bfloat16", "eager", False, backends=EVERY),
        Setting("Qwen2.5-1.5B", "bfloat16", "eager", False, 8, 1, 128, EVERY),
        Setting("Qwen2.5-1.5B", "nf4", "eager", False, 8, 1, 128, EVERY),
    ]


class Problem:
    """A model, a batch of B prompts x G responses, and a direction."""

    def __init__(self, setting: Setting, device: str) -> None:
        torch.manual_seed(0)
        self.setting = setting
        self.model = build(setting, device)
        rows = setting.prompts * setting.responses
        vocabulary = (QWEN if setting.shape != "tiny" else TINY)["vocab_size"]
        self.ids = torch.randint(1, vocabulary, (rows, setting.tokens), device=device)
        self.advantages = torch.randn(rows, device=device)
        self.rows = torch.arange(setting.prompts).repeat_interleave(setting.responses)
        self.mu = {n: torch.randn_like(p) for n, p in self.model.named_parameters() if p.requires_grad}

    def loss_fn(self, model: nn.Module, prompt: int | None = None) -> torch.Tensor:
        """L [B], or [1] of one prompt: the mean over its responses of advantage * S / T."""
        G = self.setting.responses
        part = slice(None) if prompt is None else slice(prompt * G, (prompt + 1) * G)
        ids, advantages = self.ids[part], self.advantages[part]
        logits = model(input_ids=ids, use_cache=False).logits
        S = selected_logprobs(logits, ids).mean(-1)
        return (advantages * S).view(-1, G).mean(-1)

    def run(self, backend: str) -> torch.Tensor:
        """Return s [B] by a backend; the training step returns its losses."""
        if backend == "step":
            L = self.loss_fn(self.model)
            torch.autograd.backward(L.sum())
            return L.detach()
        if backend == "jvp":
            return self.forward_mode()
        if backend == "loop":
            return torch.cat(
                [
                    project(self.model, functools.partial(self.loss_fn, prompt=n), self.mu, backend="loop")
                    for n in range(self.setting.prompts)
                ]
            )
        return project(self.model, self.loss_fn, self.mu, backend=backend, example_of_row=self.rows)

    def forward_mode(self) -> torch.Tensor:
        """All s in one forward that carries tangents; for comparison only."""
        former = [
            (module._parameters, attribute, parameter)
            for module in self.model.modules()
            for attribute, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        registries: list[tuple[Any, str, Any]] = former
        try:
            with torch.no_grad(), forward_ad.dual_level():
                for registry, attribute, parameter in registries:
                    registry[attribute] = forward_ad.make_dual(parameter.detach(), self.mu[names[id(parameter)]])
                L = self.loss_fn(self.model)
                tangent = forward_ad.unpack_dual(L).tangent
                return torch.zeros_like(L) if tangent is None else tangent.clone()
        finally:
            for registry, attribute, parameter in registries:
                registry[attribute] = parameter


project = functools.partial(per_prompt_projection, self_check="never")


def build(setting: Setting, device: str) -> nn.Module:
    """Return the model of a setting, in train mode, with random A and B."""
    sizes = QWEN if setting.shape != "tiny" else TINY
    config = Qwen2Config(**sizes, tie_word_embeddings=True, attn_implementation=setting.attention)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(former)
    if setting.base == "nf4":
        quantise(model, dtype)
    if setting.checkpointing:
        # Renamed in transformers 5.23; both take the keywords of torch's checkpoint.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    peft_model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    return peft_model.to(device).train()


def quantise(model: Any, dtype: torch.dtype) -> None:
    """Put every Linear but the head into nf4 with double quantisation, in place."""
    import bitsandbytes as bnb

    for path, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or path == "lm_head":
            continue
        bias = linear.bias is not None
        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=bias, compute_dtype=dtype)
        new.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to(linear.weight.device)
        new.bias = linear.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    model.is_loaded_in_4bit = True


def selected_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log pi(next token) [rows, tokens - 1]; the float32 copies of the logits live for a chunk at a time.

    The last position is computed and dropped: cutting it off the logits would copy all of them.
    """
    flat, chosen = logits.flatten(0, 1).split(CHUNK), ids.roll(-1, dims=1).flatten().split(CHUNK)
    parts = [
        checkpoint(_selected, flat_part, chosen_part, use_reentrant=False, preserve_rng_state=False)
        for flat_part, chosen_part in zip(flat, chosen, strict=True)
    ]
    return torch.cat(parts).view(ids.shape)[:, :-1]


def _selected(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def measure(problem: Problem, backend: str, device: str) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Run a backend once for its memory and three times for its time; report what stops it."""
    times: list[float] = []
    free(device)  # what the last one held when it ran out of memory is let go only now
    try:
        problem.model.zero_grad(set_to_none=True)
        peak = peak_memory(functools.partial(problem.run, backend), device)
        for _ in range(REPEATS):
            problem.model.zero_grad(set_to_none=True)
            synchronize(device)
            start = time.perf_counter()
            s = problem.run(backend)
            synchronize(device)
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}, None
    except (NotImplementedError, RuntimeError) as error:
        return {"failed": str(error).splitlines()[0]}, None
    finally:
        problem.model.zero_grad(set_to_none=True)
        free(device)
    return {"ms": statistics.median(times) * 1e3, "gib": peak / 2**30}, s.detach().double().cpu()


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Give cached memory back, so that a backend that ran out of it does not starve the next."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def peak_memory(run: Callable[[], Any], device: str) -> float:
    """Return the bytes of tensors at the peak beyond those that are there before; warms up, too."""
    run()
    free(device)
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    kineto: Any = profiler.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    in_use = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))
    return max(in_use, default=0)


def exact(problem: Problem, device: str) -> torch.Tensor | None:
    """Return s in float32 arithmetic, for the same weights; None if it does not fit."""
    try:
        problem.model.float()
        return problem.run("loop").double().cpu()
    except torch.OutOfMemoryError:
        return None
    finally:
        free(device)


def benchmark(device: str) -> Iterator[dict[str, Any]]:
    """Yield a row for every setting and backend, with its error relative to the loop."""
    for setting in settings(device):
        problem = Problem(setting, device)
        found: dict[str, torch.Tensor] = {}
        rows = {}
        for backend in setting.backends:
            rows[backend], s = measure(problem, backend, device)
            if s is not None:
                found[backend] = s
        truth = exact(problem, device) if setting.base == "bfloat16" and not setting.checkpointing else None
        for backend, row in rows.items():
            if backend in found and backend not in {"step", "loop"} and "loop" in found:
                row["error_to_loop"] = distance(found[backend], found["loop"])
            if backend in found and backend != "step" and truth is not None:
                row["error_to_float32"] = distance(found[backend], truth)
            yield {**setting._asdict(), "backend": backend, **row}
        del problem
        free(device)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative L2 distance over the prompts."""
    return float((found - expected).norm() / expected.norm())


def main(arguments: list[str] | None = None) -> None:
    """Run, print as it goes, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft asks transformers for renamed things
    cpu = options.device == "cpu"
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads" if cpu else torch.cuda.get_device_name()
    rows = []
    start = time.perf_counter()
    for row in benchmark(options.device):
        rows.append({key: value for key, value in row.items() if key != "backends"})
        print(json.dumps(rows[-1]), flush=True)
    about = {
        "device": name,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - start),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"projection-{'cpu' if cpu else name.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path.name}: {len(rows)} rows in {about['seconds']} s on {name}")


if __name__ == "__main__":
    main()
