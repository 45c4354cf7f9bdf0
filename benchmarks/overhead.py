"""What the probe takes: the same training with and without it, alternating in one run.

    python benchmarks/overhead.py --parts cadence phases scale doors others --shape tiny
    python benchmarks/overhead.py --parts cadence phases device --shape qwen2.5-1.5b --device cuda

Prints tables and writes a JSON file with device and versions under ``benchmarks/results``. Times are
medians of single steps; ratios are to the plain blocks directly before and after, since machines drift.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from lora_probe_callbacks import LoraProbeMonitor
from lora_probe_callbacks.distributed.transport import Ranks
from lora_probe_callbacks.engine.decision import Decisions
from lora_probe_callbacks.engine.rerun import Reruns
from lora_probe_callbacks.engine.session import ProbeSession
from lora_probe_callbacks.observe.device.step_reader import DeviceReader
from lora_probe_callbacks.observe.device.transfer import Readout
from lora_probe_callbacks.observe.forward import hooks as forwards
from lora_probe_callbacks.observe.forward import log
from lora_probe_callbacks.observe.forward.followed_backward import BackwardObserver
from lora_probe_callbacks.observe.forward.replay import ForwardRepeat

RESULTS = Path(__file__).parent / "results"
REPEATS = ("LP405", "LP307")  # what runs the forward again: rare, named, and measured apart
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
PHASES: dict[str, list[tuple[Any, str]]] = {
    "start": [(ProbeSession, "start")],
    "hooks on modules": [(forwards.ForwardObserver, "_enter"), (forwards.ForwardObserver, "_leave")],
    "hooks on outputs": [(log.ForwardLog, "_receive")],
    "installing and removing hooks": [(forwards.ForwardObserver, name) for name in ("arm", "disarm")],
    "graph walk": [(log, "walk")],
    "reading tensors": [
        (DeviceReader, name) for name in ("read_gradients", "copy", "send", "read_after", "read_samples")
    ],
    "transfer": [(Readout, "receive")],
    "decision": [(Decisions, "decide")],
    "exchange": [(Ranks, "exchange")],
    "repeats": [(ForwardRepeat, "after"), (BackwardObserver, "after"), (Reruns, "measure")],
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
        self.bytes = sum(p.numel() * p.element_size() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.ids = torch.randint(0, shape["model"]["vocab_size"], shape["batch"], device=device)
        self.device = device
        self.backward: Callable[[], object] = lambda: self.loss().backward()  # type: ignore[no-untyped-call]

    def step(self, before_update: Callable[[], object] | None = None) -> None:
        """One step; ``before_update`` is called where a user would log gradients."""
        self.backward()
        if before_update is not None:
            before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> torch.Tensor:
        """A scalar that needs no [32, 384, 151936] logits: the probe's cost does not depend on the head."""
        hidden: torch.Tensor = self.model.get_base_model().model(input_ids=self.ids)[0]
        return hidden.float().pow(2).mean()

    def steps(self, count: int, before_update: Callable[[], object] | None = None) -> list[float]:
        """Run ``count`` steps; milliseconds of each."""
        times = []
        for _ in range(count):
            self._wait()
            began = time.perf_counter()
            self.step(before_update)
            self._wait()
            times.append((time.perf_counter() - began) * 1e3)
        return times

    def probe(self, every_n_steps: int, *ignore: str) -> LoraProbeMonitor:
        """A monitor of this training."""
        return LoraProbeMonitor(self.model, self.optimizer, every_n_steps=every_n_steps, ignore=ignore, verbose=False)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def beside(
    plain: Callable[[], float], ways: dict[str, Callable[[], float]], blocks: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of each way, and its ratio to the two plain blocks that it ran between."""
    plains = [plain()]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(blocks):
        for name, way in ways.items():
            took = way()
            plains.append(plain())
            found[name].append((took, 2 * took / (plains[-2] + plains[-1])))
    rows = {"plain": {"ms": round(statistics.median(plains), 3), "ratio": 1.0, "ratio_min": 1.0, "ratio_max": 1.0}}
    for name, pairs in found.items():
        times, ratios = zip(*pairs, strict=True)
        rows[name] = {
            "ms": round(statistics.median(times), 3),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_min": round(min(ratios), 4),
            "ratio_max": round(max(ratios), 4),
        }
    return rows


def cadence(training: Training, blocks: int, steps: int) -> dict[str, Any]:
    """Plain steps, steps probed every time, and steps between probes."""
    training.steps(3)
    healthy = []

    def plain() -> float:
        return statistics.median(training.steps(steps))

    def probed(every: int) -> float:
        with training.probe(every, *REPEATS) as probe:
            training.steps(5)
            took = plain()
        healthy.append(bool(probe.report.healthy) and not probe.report.internal_errors)
        return took

    rows = beside(plain, {"every step": lambda: probed(1), "between probes": lambda: probed(10**6)}, blocks)
    extra = rows["every step"]["ratio"] - 1
    return {
        "rows": rows,
        "ms_per_probed_step": round(extra * rows["plain"]["ms"], 3),
        "default_cadence": round(1 + extra / 50, 5),
        "healthy": all(healthy),
    }


@contextmanager
def timed(training: Training) -> Iterator[dict[str, float]]:
    """Milliseconds by phase, of what is run inside; a phase within another is taken out of that one."""
    spent = dict.fromkeys(PHASES, 0.0)
    running: list[str] = []
    last = time.perf_counter()

    def switch() -> None:
        nonlocal last
        now = time.perf_counter()
        if running:
            spent[running[-1]] += (now - last) * 1e3
        last = now

    def around(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def inner(*args: Any, **kwargs: Any) -> Any:
            switch()
            running.append(phase)
            try:
                return method(*args, **kwargs)
            finally:
                switch()
                running.pop()

        return inner

    patches = [
        patch.object(owner, name, around(phase, getattr(owner, name)))
        for phase, places in PHASES.items()
        for owner, name in places
    ]
    for each in patches:
        each.start()
    try:
        yield spent
    finally:
        for each in patches:
            each.stop()


def phases(training: Training, steps: int) -> dict[str, float]:
    """Milliseconds of a probed step by phase; of the start, once; of the repeats, in a step that has them."""
    with timed(training) as spent, training.probe(1, *REPEATS):
        training.steps(4)
        start = spent["start"]
        before = dict(spent)
        training.steps(steps)
        rows = {phase: (spent[phase] - before[phase]) / steps for phase in PHASES}
    with timed(training) as spent, training.probe(10**6):
        training.steps(4)  # these have the repeats
        rows["repeats"] = spent["repeats"] / 4
    return {phase: round(value, 3) for phase, value in {**rows, "start": start}.items()}


def device(training: Training) -> dict[str, Any]:
    """Device memory and synchronisations, counted."""
    torch.cuda.synchronize()
    training.step()
    counts, peaks, held = {}, {}, {}
    for name, context in (
        ("plain", nullcontext()),
        ("between probes", training.probe(10**6, *REPEATS)),
        ("every step", training.probe(1, *REPEATS)),
    ):
        with context:
            training.steps(5)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held[name] = torch.cuda.memory_allocated()
            training.steps(1)
            peaks[name] = torch.cuda.max_memory_allocated()
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            ) as profile:
                training.step()
                torch.cuda.synchronize()
            events = [event.name for event in profile.events()]
            # cudaMemcpyAsync to pageable memory is followed by a cudaStreamSynchronize.
            counts[name] = sum("cudaStreamSynchronize" in e for e in events)
    adapter = training.bytes
    return {
        "adapter_bytes": adapter,
        "held_between_probes": held["between probes"] - held["plain"],
        "peak_over_plain": peaks["every step"] - peaks["plain"],
        "peak_between_probes": peaks["between probes"] - peaks["plain"],
        "synchronisations": {name: count - counts["plain"] for name, count in counts.items()},
    }


def scale(steps: int, where: str) -> list[dict[str, Any]]:
    """Milliseconds of a probed step over the number of tensors, and over what it must not depend on."""
    small = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
    cases: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
        (f"{layers * 14} tensors", {**small, "num_hidden_layers": layers}, (1, 8)) for layers in (4, 8, 28, 90, 357)
    ]
    cases += [
        (f"hidden size {h}", {**small, "hidden_size": h, "intermediate_size": 2 * h}, (1, 8)) for h in (32, 128, 512)
    ]
    cases += [(f"batch {b}", small, (b, 8)) for b in (1, 8, 64)]
    cases += [(f"{s} tokens", small, (1, s)) for s in (8, 64, 512)]
    rows = []
    for name, model, batch in cases:
        training = Training({"model": model, "heads": (4, 2), "batch": batch, "rank": 4}, where)
        spent = phases(training, steps)
        apart = {p: spent.pop(p) for p in ("start", "repeats", "graph walk")}
        rows.append({"case": name, "tensors": training.tensors, "probed_step": round(sum(spent.values()), 3), **apart})
        print(f"{name:<20}{training.tensors:>6} tensors {rows[-1]['probed_step']:>9.2f} ms   {apart}")
    return rows


def others(training: Training, blocks: int, steps: int) -> dict[str, dict[str, float]]:
    """The same training under what people use instead, in every step."""
    ways: dict[str, Callable[[], AbstractContextManager[Callable[[], object] | None]]] = {
        "LoraProbeMonitor, every step": lambda: _monitored(training, 1),
        "LoraProbeMonitor, every 50 steps": lambda: _monitored(training, 50),
        "PEFT get_model_status, every step": lambda: nullcontext(training.model.get_model_status),
    }
    for package, name, way in (
        ("lightning", "Lightning grad_norm, every step", _grad_norm),
        ("tensorboard", "TensorBoard histograms, every step", _histograms),
        ("wandb", "wandb.watch(log_freq=1), offline", _watched),
        ("guardtower", "guardtower.audit, every step", _audited),
    ):
        if importlib.util.find_spec(package) is not None:
            ways[name] = lambda way=way: way(training)  # type: ignore[misc]
    training.steps(3)

    def run(way: Callable[[], AbstractContextManager[Callable[[], object] | None]]) -> float:
        with way() as before_update:
            training.steps(5, before_update)
            return statistics.fmean(training.steps(max(steps, 50), before_update))  # a mean: some probe in some steps

    return beside(lambda: run(nullcontext), {name: partial(run, way) for name, way in ways.items()}, blocks)


@contextmanager
def _monitored(training: Training, every: int) -> Iterator[None]:
    with training.probe(every, *REPEATS):
        yield None


@contextmanager
def _grad_norm(training: Training) -> Iterator[Callable[[], object]]:
    from lightning.pytorch.utilities import grad_norm

    yield lambda: {name: float(value) for name, value in grad_norm(training.model, 2).items()}


@contextmanager
def _histograms(training: Training) -> Iterator[Callable[[], object]]:
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:

        def write() -> None:
            for name, parameter in training.model.named_parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    writer.add_histogram(name, parameter)
                    writer.add_histogram(f"{name}.grad", parameter.grad)

        yield write


@contextmanager
def _watched(training: Training) -> Iterator[Callable[[], object]]:
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True))
        run.watch(training.model, log="all", log_freq=1)
        try:
            yield lambda: run.log({"step": 0})
        finally:
            run.unwatch(training.model)
            run.finish()


@contextmanager
def _audited(training: Training) -> Iterator[None]:
    import guardtower  # it makes the forward and the backward itself

    plain, optimizer = training.backward, training.optimizer
    training.backward = lambda: guardtower.audit(training.model, training.loss, optimizer=optimizer)
    try:
        yield None
    finally:
        training.backward = plain


def doors(blocks: int, steps: int) -> dict[str, dict[str, Any]]:
    """The Trainer's and Lightning's loops, with and without the callback, at the default cadence and at every step."""
    return {"Lightning": _lightning(blocks, steps), "Transformers Trainer": _trainer(blocks, steps)}


def _lightning(blocks: int, steps: int) -> dict[str, dict[str, float]]:
    import lightning

    from lora_probe_callbacks import LoraProbe

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.training_ = Training(SHAPES["tiny"], "cpu")
            self.model = self.training_.model

        def training_step(self, batch: object, index: int) -> torch.Tensor:
            return self.training_.loss()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-5)

    def run(probes: list[lightning.Callback]) -> float:
        trainer = lightning.Trainer(
            max_steps=4 + steps, callbacks=probes, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        began = time.perf_counter()
        trainer.fit(Task(), torch.utils.data.DataLoader(torch.zeros(4 + steps, 1)))
        return (time.perf_counter() - began) * 1e3

    return _door(run, lambda every: [LoraProbe(every_n_steps=every, ignore=REPEATS, verbose=False)], blocks)


def _trainer(blocks: int, steps: int) -> dict[str, dict[str, float]]:
    import transformers

    from lora_probe_callbacks import LoraProbeTrainerCallback

    def run(probes: list[Any]) -> float:
        training = Training(SHAPES["tiny"], "cpu")
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder, max_steps=4 + steps, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                save_strategy="no", disable_tqdm=True, logging_strategy="no",
            )  # fmt: skip
            rows = [{"input_ids": row, "labels": row} for row in training.ids.tolist()] * (4 + steps)
            trainer = transformers.Trainer(training.model, arguments, train_dataset=rows, callbacks=probes)
            began = time.perf_counter()
            trainer.train()
            return (time.perf_counter() - began) * 1e3

    def probe(every: int) -> list[Any]:
        return [LoraProbeTrainerCallback(every_n_steps=every, ignore=REPEATS, verbose=False)]

    return _door(run, probe, blocks)


def _door(
    run: Callable[[list[Any]], float], probe: Callable[[int], list[Any]], blocks: int
) -> dict[str, dict[str, float]]:
    """Whole runs, the start and the first four steps included."""
    run([])
    ways = {"every 50 steps": lambda: run(probe(50)), "every step": lambda: run(probe(1))}
    return beside(lambda: run([]), ways, blocks)


def show(rows: dict[str, dict[str, float]]) -> None:
    """Print one table."""
    for row, values in rows.items():
        spread = f"[{values['ratio_min']:.4f}, {values['ratio_max']:.4f}]"
        print(f"{row:<38}{values['ms']:>10.2f} ms   x {values['ratio']:.4f}  {spread}")


def main() -> None:
    """Measure one shape on one device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--parts", nargs="+", default=["cadence"], choices=("cadence", "phases", "device", "scale", "doors", "others")
    )
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    training = Training(SHAPES[options.shape], options.device)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU, 1 thread"
    packages = ("torch", "peft", "transformers", "lightning", "wandb", "tensorboard", "guardtower")
    result: dict[str, Any] = {
        "shape": options.shape,
        "device": name,
        "adapter_tensors": training.tensors,
        "versions": {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)},
    }
    if "cadence" in options.parts:
        result |= cadence(training, options.blocks, options.steps)
        show(result["rows"])
        print(f"probed step +{result['ms_per_probed_step']:.2f} ms; every 50 steps: x {result['default_cadence']:.5f}")
    if "phases" in options.parts:
        result["phases"] = phases(training, options.steps)
        print("\n".join(f"{phase:<38}{value:>10.2f} ms" for phase, value in result["phases"].items()))
    if "device" in options.parts:
        result["device_memory"] = device(training)
        print(result["device_memory"])
    if "scale" in options.parts:
        result["scale"] = scale(options.steps, options.device)
    if "doors" in options.parts:
        result["doors"] = doors(options.blocks, 5 * options.steps)
        for door, rows in result["doors"].items():
            print(door)
            show(rows)
    if "others" in options.parts:
        result["others"] = others(training, options.blocks, options.steps)
        show(result["others"])
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"overhead-{options.shape}-{options.device}.json"
    if path.exists():  # parts that were measured before stay
        result = {**json.loads(path.read_text()), **result}
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
