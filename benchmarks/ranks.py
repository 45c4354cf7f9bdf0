"""The faults and the healthy runs of several processes, on real devices, and what the exchange costs.

    python benchmarks/ranks.py --backend gloo                    2 processes on the CPU
    python benchmarks/ranks.py --backend nccl --out file.json    2 CUDA GPUs
    python benchmarks/ranks.py --only healthy_ddp

Writes versions, devices, what passed, failed and was skipped, and times; by default to
``benchmarks/results/ranks-<device>.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_probe_callbacks import LoraProbeMonitor
from lora_probe_callbacks.distributed import transport as exchange
from lora_probe_callbacks.distributed.transport import SIZE, Ranks
from lora_probe_callbacks.estimators import VarianceProbe

SIZES = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
STEPS = 6
LIMIT = 60.0  # seconds in which every run must have ended, whatever happens in it

Told = Literal["all", "left", "nobody"]


@dataclass(frozen=True)
class Run:
    """One run, and what must be found.

    Attributes:
        make: Trains; returns the report, or one and why it is not what it should be.
        code: The one finding, or nothing.
        step: Its step.
        told: Which ranks must report it. Where ranks are left waiting in a reduction, NCCL ends their
            processes after its timeout: then those that are left, if any are.
        alone: In processes of its own.
    """

    make: Callable[[torch.device], Any]
    code: str = ""
    step: int = 0
    told: Told = "all"
    alone: bool = False


RUNS: dict[str, Run] = {}


class NotHereError(Exception):
    """This run needs something that is not installed here."""


def run(code: str = "", step: int = 0, *, told: Told = "all", alone: bool = False) -> Callable[[Any], Any]:
    """Enter a run; ``code`` is what must be found, in ``step``."""

    def enter(function: Any) -> Any:
        RUNS[function.__name__] = Run(function, code, step, told, alone)
        return function

    return enter


# --- models -------------------------------------------------------------------------------------


def base() -> LlamaForCausalLM:
    """A Llama of a million parameters, the same on all ranks."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, use_cache=False))


def lora(model: nn.Module, **changes: Any) -> PeftModel:
    """LoRA on q and v."""
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **changes}))


def ddp(model: nn.Module, device: torch.device, **options: Any) -> DistributedDataParallel:
    """The model in DistributedDataParallel, on its device."""
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, **options)


def shard(model: PeftModel | LlamaForCausalLM, layers: Any, device: torch.device) -> None:
    """fully_shard every layer and the rest."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trainable."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def batch(step: int, device: torch.device, rank: int | None = None) -> torch.Tensor:
    """Other data on every rank."""
    generator = torch.Generator().manual_seed(100 * step + (dist.get_rank() if rank is None else rank))
    return torch.randint(1, 256, (2, 32), generator=generator).to(device)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    called: nn.Module | None = None,
    before: Callable[[int], None] = lambda step: None,
    after_forward: Callable[[int], None] = lambda step: None,
    before_step: Callable[[int], None] = lambda step: None,
    around: Callable[[int], Any] = lambda micro: nullcontext(),
    step: Callable[[], Any] | None = None,
    accumulate: int = 1,
    autocast: bool = False,
    probed: bool = True,
    **intent: Any,
) -> Any:
    """Six steps with other data on every rank; returns the report."""
    model.train()
    probe = LoraProbeMonitor(model, optimizer, **{"verbose": False, "every_n_steps": 2, **intent})
    try:
        with probe if probed else nullcontext():
            for number in range(STEPS):
                before(number)
                for micro in range(accumulate):
                    ids = batch(accumulate * number + micro, device)
                    with around(micro), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                        loss = (called or model)(input_ids=ids, labels=ids).loss
                        after_forward(number)
                        loss.backward()
                before_step(number)
                (step or optimizer.step)()
                optimizer.zero_grad()
    except Exception as error:
        if not probe.report.failures and not isinstance(error, Expected):
            raise
    return probe.report


class Expected(Exception):  # noqa: N818 - the user's own, raised on purpose
    """What a run raises itself."""


def last() -> bool:
    """This is the rank that has the fault."""
    return dist.get_rank() == dist.get_world_size() - 1


def adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA tensors."""
    return {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}


# --- runs ---------------------------------------------------------------------------------------


@run()
def healthy_ddp(device: torch.device) -> Any:
    """DDP as it should be."""
    model = ddp(lora(base()).to(device), device)
    return train(model, adamw(model), device, autocast=True)


def qlora(device: torch.device) -> PeftModel:
    """LoRA on a base in 4 bits."""
    try:
        importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError as missing:
        raise NotHereError("bitsandbytes is not installed") from missing
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    folder = Path(os.environ["RANKS_FOLDER"], "base")
    base().save_pretrained(folder)  # writes on rank 0 alone
    dist.barrier()
    loaded = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantised, device_map={"": device})
    return lora(prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False))


@run()
def healthy_ddp_qlora(device: torch.device) -> Any:
    """A 4-bit base in DDP."""
    model = ddp(qlora(device), device)
    return train(model, adamw(model), device, autocast=True)


@run("LP702")
def qlora_inner_module_called(device: torch.device) -> Any:
    """L01 with a 4-bit base."""
    model = ddp(qlora(device), device)
    return train(model, adamw(model), device, called=model.module, autocast=True)


@run()
def healthy_ddp_accumulation(device: torch.device) -> Any:
    """Two micro-batches, the first inside no_sync()."""
    model = ddp(lora(base()).to(device), device)
    around = lambda micro: model.no_sync() if micro == 0 else nullcontext()  # noqa: E731
    return train(model, adamw(model), device, accumulate=2, around=around)


@run()
def healthy_ddp_compiled(device: torch.device) -> Any:
    """torch.compile around DDP."""
    model = torch.compile(ddp(lora(base()).to(device), device), backend="aot_eager")
    return train(model, adamw(model), device)


@run()
def healthy_compiled_inside_ddp(device: torch.device) -> Any:
    """DDP around torch.compile."""
    model = ddp(torch.compile(lora(base()).to(device), backend="aot_eager"), device)
    return train(model, adamw(model), device)


@run()
def ddp_is_bit_equal_with_the_probe(device: torch.device) -> Any:
    """Weights after six steps, with and without a probe and its estimator."""
    trained, report = [], None
    for probed in (False, True):
        model = ddp(lora(base()).to(device), device)
        estimator = VarianceProbe(lambda step: batch(1000 + step, device), row_losses, every_n_steps=2)
        made = train(
            model, adamw(model), device, probed=probed, estimator=estimator if probed else None, ignore=("LP902",)
        )
        report = made if probed else report
        trained.append(adapter(model))
    differ = [name for name, tensor in trained[0].items() if not torch.equal(tensor, trained[1][name])]
    missing = [] if "lora_probe/estimator/delta_1" in report.metrics else ["no estimate was made"]
    return report, "; ".join([f"{name} differs" for name in differ] + missing)


def row_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each row, [B]."""
    log_p = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None])[..., 0].mean(1)


NORMS = ("gradient/norm_A", "gradient/norm_B", "update/relative_norm")


def norms(model: nn.Module, device: torch.device, called: nn.Module | None = None) -> tuple[Any, list[float]]:
    """The norms of a run with SGD, in float64."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    report = train(model, optimizer, device, called=called, every_n_steps=1)
    return report, [report.metrics[f"lora_probe/{name}"] for name in NORMS]


class Joined(nn.Module):
    """One process on the batches of all."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.inner, self.device, self.step = model, device, 0

    def forward(self, **batches: torch.Tensor) -> Any:
        """Take the batches of all ranks in the place of those of this one."""
        ids = torch.cat([batch(self.step, self.device, rank) for rank in range(dist.get_world_size())])
        self.step += 1
        return self.inner(input_ids=ids, labels=ids)


def norms_compared(device: torch.device, wrap: Callable[[Any], nn.Module]) -> Any:
    """Norms under a wrapper and without one."""
    model = Joined(lora(base()).double().to(device), device)
    _, expected = norms(model, device)
    report, got = norms(wrap(lora(base()).double().to(device)), device)
    apart = max(abs(a - b) / b for a, b in zip(got, expected, strict=True))
    return report, "" if apart < 1e-6 else f"norms {got} differ from those of one process, {expected}"


@run()
def norms_under_ddp(device: torch.device) -> Any:
    """DDP against one process on the joined batch."""
    return norms_compared(device, lambda model: ddp(model, device))


@run()
def norms_under_fully_shard(device: torch.device) -> Any:
    """fully_shard against one process on the joined batch."""

    def wrap(model: Any) -> nn.Module:
        shard(model, model.base_model.model.model.layers, device)
        return model  # type: ignore[no-any-return]

    return norms_compared(device, wrap)


@run()
def healthy_fully_shard(device: torch.device) -> Any:
    """fully_shard, with an adapter that belongs to the root."""
    model = lora(base(), target_modules=["q_proj", "v_proj", "lm_head"]).to(device)
    shard(model, model.base_model.model.model.layers, device)
    return train(model, adamw(model), device)


@run()
def healthy_fsdp1(device: torch.device) -> Any:
    """FSDP1 with the original parameters."""
    model = FullyShardedDataParallel(lora(base()).to(device), use_orig_params=True, device_id=device)
    return train(model, adamw(model), device)


@run("LP702")
def inner_module_called(device: torch.device) -> Any:
    """L01: the loss is made on the module inside DDP."""
    model = ddp(lora(base()).to(device), device)
    return train(model, adamw(model), device, called=model.module)


@run("LP702")
def no_sync_never_left(device: torch.device) -> Any:
    """L04: every backward is inside no_sync()."""
    model = ddp(lora(base()).to(device), device)
    return train(model, adamw(model), device, around=lambda micro: model.no_sync())


@run("LP703")
def activated_after_wrapping(device: torch.device) -> Any:
    """L02: another adapter is activated after DDP was made."""
    inner = lora(base())
    inner.add_adapter("b", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model = ddp(inner.to(device), device)
    inner.set_adapter("b")
    return train(model, adamw(model), device)


@run("LP703")
def adapter_after_fully_shard(device: torch.device) -> Any:
    """L03: the adapter stands beside the shards."""
    model = base().to(device)
    shard(model, model.model.layers, device)
    torch.manual_seed(50 + dist.get_rank())
    adapted = lora(model).to(device)
    return train(adapted, adamw(adapted), device)


@run("LP202")
def optimizer_before_fully_shard(device: torch.device) -> Any:
    """E05: the optimizer holds what was there before the shards."""
    model = lora(base()).to(device)
    optimizer = adamw(model)
    shard(model, model.base_model.model.model.layers, device)
    return train(model, optimizer, device)


@run("LP701")
def other_seeds_without_wrapper(device: torch.device) -> Any:
    """L06: every rank initialises its own adapter."""
    inner = base()
    torch.manual_seed(dist.get_rank())
    model = lora(inner).to(device)
    return train(model, adamw(model), device)


@run("LP701")
def other_seeds_reduced_by_hand(device: torch.device) -> Any:
    """L06: other tensors, one gradient."""
    inner = base()
    torch.manual_seed(dist.get_rank())
    model = lora(inner).to(device)

    def reduce(step: int) -> None:
        for tensor in model.parameters():
            if tensor.grad is not None:
                dist.all_reduce(tensor.grad)

    return train(model, adamw(model), device, before_step=reduce)


@run("LP206")
def base_trained_after_fully_shard(device: torch.device) -> Any:
    """L07: the optimizer is built of everything, the frozen base included."""
    model = lora(base()).to(device)
    shard(model, model.base_model.model.model.layers, device)
    model.requires_grad_(True)
    return train(model, adamw(model), device)


# --- a fault on one rank --------------------------------------------------------------------------


def with_head(device: torch.device) -> DistributedDataParallel:
    """The head is trained too: a rank that trains nothing at all leaves the others in DDP's reduction."""
    return ddp(lora(base(), modules_to_save=["lm_head"]).to(device), device, find_unused_parameters=True)


@run("LP201")
def start_on_one_rank(device: torch.device) -> Any:
    """One optimizer owns half of the adapter."""
    model = with_head(device)
    owned = [p for p in model.parameters() if p.requires_grad]
    return train(model, torch.optim.AdamW(owned[: 8 if last() else None], lr=1e-3), device)


@run("LP103", 2)
def forward_on_one_rank(device: torch.device) -> Any:
    """One rank merges its adapter in step 2."""
    model = with_head(device)

    def before(step: int) -> None:
        if step == 2 and last():
            model.module.merge_adapter()

    return train(model, adamw(model), device, before=before)


@run("LP302")
def backward_on_one_rank(device: torch.device) -> Any:
    """One rank throws its gradients away."""
    model = with_head(device)

    def before_step(step: int) -> None:
        for tensor in model.parameters() if last() else ():
            tensor.grad = None

    return train(model, adamw(model), device, before_step=before_step)


@run("LP701", 2)
def step_on_one_rank(device: torch.device) -> Any:
    """One rank writes other values in step 2."""
    model = with_head(device)

    def before(step: int) -> None:
        for tensor in adapter(model).values() if step == 2 and last() else ():
            tensor.data.normal_()

    return train(model, adamw(model), device, before=before)


@run("LP701", 2)
def skipped_step_on_one_rank(device: torch.device) -> Any:
    """One rank's scaler skips step 1."""
    model = with_head(device)
    optimizer, scaler = adamw(model), torch.amp.GradScaler(device.type, init_scale=1.0)

    def before_step(step: int) -> None:
        if step == 1 and last():
            next(p for p in model.parameters() if p.grad is not None).grad[0] = math.inf

    def make() -> None:
        scaler.scale(torch.zeros((), device=device))
        scaler.step(optimizer)
        scaler.update()

    return train(model, optimizer, device, before_step=before_step, step=make, scaler=scaler)


@run(told="nobody", alone=True)
def exception_on_one_rank(device: torch.device) -> Any:
    """The user's code raises between a forward and its backward; the others end with the group's timeout."""
    model = with_head(device)

    def after_forward(step: int) -> None:
        if step == 2 and last():
            raise Expected

    return train(model, adamw(model), device, after_forward=after_forward)


@run("LP102", 2, told="left", alone=True)
def disabled_on_one_rank(device: torch.device) -> Any:
    """Without its adapter one rank reduces nothing, and the others wait for it in their backward."""
    inner = base()
    inner.enable_input_require_grads()
    model = lora(inner).to(device)
    shard(model, model.base_model.model.model.layers, device)

    def before(step: int) -> None:
        if step == 2 and last():
            model.disable_adapter_layers()

    return train(model, adamw(model), device, before=before)


@run(told="nobody", alone=True)
def death_of_one_rank(device: torch.device) -> Any:
    """A process ends without a word."""
    model = with_head(device)

    def before_step(step: int) -> None:
        if step == 2 and last():
            os._exit(0)

    return train(model, adamw(model), device, before_step=before_step)


# --- processes ------------------------------------------------------------------------------------


def judged(name: str, device: torch.device) -> dict[str, Any]:
    """What one rank says of one run."""
    began = time.perf_counter()
    told: dict[str, Any] = {}
    try:
        result = RUNS[name].make(device)
        report, wrong = result if isinstance(result, tuple) else (result, "")
        found = [[f.code, f.step] for f in report.with_status("fail", "warn")]
        told = {"found": found, "wrong": "; ".join([wrong, *report.internal_errors]).strip("; ")}
    except NotHereError as missing:
        told["skipped"] = str(missing)
    except Exception:
        told["raised"] = traceback.format_exc()[-2000:]
    return {**told, "seconds": time.perf_counter() - began}


def worker(rank: int, names: list[str], backend: str, world: int, folder: str) -> None:
    """One process: makes the runs one after the other, and leaves what it says of each in a file."""
    torch.set_num_threads(1)
    exchange.IN_NEED = 5.0
    os.environ["RANKS_FOLDER"] = folder
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for name in names:
        limit = 15 if RUNS[name].alone else 45
        with group(name, backend, rank, world, folder, limit):
            told = judged(name, device)
        Path(folder, f"{name}-{rank}.json").write_text(json.dumps(told))


@contextmanager
def group(name: str, backend: str, rank: int, world: int, folder: str, limit: float) -> Iterator[None]:
    """A group for each run: a collective that one has left incomplete is none of the next."""
    where = Path(folder) / f"{name}.store"
    dist.init_process_group(
        backend, init_method=f"file://{where}", rank=rank, world_size=world, timeout=timedelta(seconds=limit)
    )
    yield
    dist.destroy_process_group()


def launched(names: list[str], backend: str, world: int, folder: str) -> bool:
    """Make some runs in processes of their own; returns whether they have all come to an end by themselves."""
    context = mp.get_context("spawn")
    arguments = (names, backend, world, folder)
    processes = [context.Process(target=worker, args=(rank, *arguments)) for rank in range(world)]
    progress = time.monotonic()
    for process in processes:
        process.start()
    before = seen = len(list(Path(folder).glob("*.json")))
    while any(process.is_alive() for process in processes):
        time.sleep(0.1)
        written = len(list(Path(folder).glob("*.json")))
        if written > seen:
            seen, progress = written, time.monotonic()
        if time.monotonic() - progress > (LIMIT + 30 if seen > before else 4 * LIMIT):  # first come the imports
            break
    ended = not any(process.is_alive() for process in processes)
    for process in processes:
        process.kill()
        process.join()
    return ended


def outcome(name: str, world: int, folder: str, *, ended: bool) -> dict[str, Any]:
    """What all ranks say of one run, and whether it is what it should be; it must have ended by itself."""
    case = RUNS[name]
    files = [Path(folder, f"{name}-{rank}.json") for rank in range(world)]
    told = [json.loads(file.read_text()) if file.exists() else None for file in files]
    present = [one for one in told if one is not None]
    seconds = round(max((one["seconds"] for one in present), default=0.0), 2)
    reasons = [one["skipped"] for one in present if "skipped" in one]
    if reasons:
        return {"outcome": "skipped", "why": reasons[0]}
    expected = [[case.code, case.step]] if case.code else []
    if case.told == "all":
        good = len(present) == world and all(one.get("found") == expected and not one["wrong"] for one in present)
    else:
        expected = expected if case.told == "left" else []
        good = ended and all(one["found"] == expected for one in present if one.get("found"))
    good = good and seconds < LIMIT
    said = [one or "its process ended without a word" for one in told]
    if case.told == "left":
        said = [rank for rank, one in enumerate(told) if one and one.get("found")]
        return {"outcome": "passed" if good else "failed", "seconds": seconds, "reported by ranks": said}
    return {"outcome": "passed" if good else "failed", "seconds": seconds, **({} if good else {"ranks": said})}


def exchanges(backend: str, world: int, folder: str) -> dict[str, Any]:
    """What the exchange costs between ranks that wait for nobody, and how often a run makes one."""
    mp.spawn(_exchanges, (backend, world, folder), nprocs=world)
    measured: dict[str, Any] = json.loads(Path(folder, "exchanges.json").read_text())
    return measured


def _exchanges(rank: int, backend: str, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with group("exchanges", backend, rank, world, folder, 60):
        ranks, alone = Ranks(), []
        ranks.enter()
        for _ in range(200):
            began = time.perf_counter()
            ranks.exchange(b"x" * SIZE, in_need=False)
            alone.append(1e3 * (time.perf_counter() - began))
        ranks.close()
        inside: list[float] = []
        sent: list[int] = []
        original = Ranks.exchange

        def timed(self: Ranks, message: bytes, *, in_need: bool) -> list[bytes]:
            began = time.perf_counter()
            heard = original(self, message, in_need=in_need)
            inside.append(1e3 * (time.perf_counter() - began))
            sent.append(max(map(len, heard)))
            return heard

        Ranks.exchange = timed  # type: ignore[method-assign]
        model = ddp(lora(base()).to(device), device)
        report = train(model, adamw(model), device, every_n_steps=1)
        Ranks.exchange = original  # type: ignore[method-assign]
    if rank == 0:
        measured = {
            "bytes": max(sent),
            "probed_steps": report.judged_steps,
            "collectives": len(inside),  # one a probed step, and one at the end
            "ms": round(statistics.median(alone), 3),
            "ms_per_probed_step_in_a_run": round(statistics.median(inside), 3),
        }
        Path(folder, "exchanges.json").write_text(json.dumps(measured))


def versions() -> dict[str, str]:
    """Of the packages that matter."""
    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "lora_probe_callbacks"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run everything, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--world", type=int, default=2, help="number of processes")
    parser.add_argument("--out", type=Path, help="where to write the result")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS), metavar="RUN")
    given = parser.parse_args(arguments)
    if given.backend == "nccl" and torch.cuda.device_count() < given.world:
        raise SystemExit(f"got {torch.cuda.device_count()} CUDA devices, expected {given.world}: use --backend gloo")
    began = time.monotonic()
    device = torch.cuda.get_device_name(0) if given.backend == "nccl" else "cpu"
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:

        def settle(name: str, *, ended: bool) -> None:
            results[name] = outcome(name, given.world, folder, ended=ended)
            print(name, json.dumps(results[name]), flush=True)

        waiting = [name for name in given.only if not RUNS[name].alone]
        while waiting:  # processes that have died are started again for the runs that are left
            ended = launched(waiting, given.backend, given.world, folder)
            done = [n for n in waiting if all(Path(folder, f"{n}-{r}.json").exists() for r in range(given.world))]
            for name in [*done, *(n for n in waiting if n not in done)][: len(done) + 1]:
                settle(name, ended=ended)
            waiting = [name for name in waiting if name not in results]
        for name in given.only:
            if RUNS[name].alone:
                settle(name, ended=launched([name], given.backend, given.world, folder))
        cost = exchanges(given.backend, given.world, folder)
    counted = {kind: sum(r["outcome"] == kind for r in results.values()) for kind in ("passed", "failed", "skipped")}
    written = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions(),
        "backend": given.backend,
        "devices": [device] * given.world,
        **counted,
        "seconds": round(time.monotonic() - began, 1),
        "exchange": cost,
        "runs": results,
    }
    path = given.out or Path(__file__).parent / "results" / f"ranks-{device.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(written, indent=2) + "\n")
    print(f"{counted}, {written['seconds']} s, exchange {cost}: {path}")


if __name__ == "__main__":
    main()
