"""The faults and the healthy runs of several processes, on real devices, and what the exchange costs.

    torchrun --standalone --nproc-per-node 2 benchmarks/ranks.py          2 CUDA GPUs with NCCL, else gloo
    torchrun --standalone --nproc-per-node 2 benchmarks/ranks.py --cpu

Writes ``benchmarks/results/ranks-<device>.json``: versions, devices, what passed and failed, times.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_probe_callbacks import LoraProbeError, LoraProbeMonitor
from lora_probe_callbacks.observe.ranks import SIZE, Ranks

SIZES = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
SCENARIOS: dict[str, tuple[Callable[[torch.device], Any], str, int]] = {}  # name to (run, expected code, its step)


def scenario(code: str = "", step: int = 0) -> Callable[[Any], Any]:
    """Enter a run; ``code`` is what must be found, in ``step``."""

    def enter(function: Any) -> Any:
        SCENARIOS[function.__name__] = (function, code, step)
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


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    called: nn.Module | None = None,
    before: Callable[[int], None] = lambda step: None,
    around: Callable[[], Any] = nullcontext,
    autocast: bool = False,
) -> Any:
    """Six steps with other data on every rank; returns the report."""
    probe = LoraProbeMonitor(model, optimizer, verbose=False, every_n_steps=2)
    with suppress(LoraProbeError), probe:
        for number in range(6):
            before(number)
            generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
            ids = torch.randint(1, 256, (2, 32), generator=generator).to(device)
            with around(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                (called or model)(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return probe.report


# --- runs ---------------------------------------------------------------------------------------


@scenario()
def healthy_ddp(device: torch.device) -> Any:
    """DDP as it should be."""
    model = ddp(lora(base()).to(device), device)
    return train(model, adamw(model), device, autocast=True)


@scenario()
def healthy_ddp_qlora(device: torch.device) -> Any:
    """A 4-bit base in DDP."""
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    folder = Path(tempfile.gettempdir()) / f"ranks-{os.environ['MASTER_PORT']}-{os.getppid()}" / "base"
    base().save_pretrained(folder)  # only rank 0 writes
    dist.barrier()
    loaded = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantised, device_map={"": device})
    model = ddp(lora(prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)), device)
    return train(model, adamw(model), device, autocast=True)


@scenario()
def healthy_fully_shard(device: torch.device) -> Any:
    """fully_shard, with an adapter that belongs to the root."""
    model = lora(base(), target_modules=["q_proj", "v_proj", "lm_head"]).to(device)
    shard(model, model.base_model.model.model.layers, device)
    return train(model, adamw(model), device)


@scenario()
def healthy_fsdp1(device: torch.device) -> Any:
    """FSDP1 with the original parameters."""
    model = FullyShardedDataParallel(lora(base()).to(device), use_orig_params=True, device_id=device)
    return train(model, adamw(model), device)


@scenario("LP702")
def inner_module_called(device: torch.device) -> Any:
    """L01: the loss is made on the module inside DDP."""
    model = ddp(lora(base()).to(device), device)
    return train(model, adamw(model), device, called=model.module)


@scenario("LP702")
def no_sync_never_left(device: torch.device) -> Any:
    """L04: every backward is inside no_sync()."""
    model = ddp(lora(base()).to(device), device)
    return train(model, adamw(model), device, around=model.no_sync)


@scenario("LP703")
def activated_after_wrapping(device: torch.device) -> Any:
    """L02: another adapter is activated after DDP was made."""
    inner = lora(base())
    inner.add_adapter("b", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model = ddp(inner.to(device), device)
    inner.set_adapter("b")
    return train(model, adamw(model), device)


@scenario("LP703")
def adapter_after_fully_shard(device: torch.device) -> Any:
    """L03: the adapter stands beside the shards."""
    model = base().to(device)
    shard(model, model.model.layers, device)
    torch.manual_seed(50 + dist.get_rank())
    adapted = lora(model).to(device)
    return train(adapted, adamw(adapted), device)


@scenario("LP202")
def optimizer_before_fully_shard(device: torch.device) -> Any:
    """E05: the optimizer holds what was there before the shards."""
    model = lora(base()).to(device)
    optimizer = adamw(model)
    shard(model, model.base_model.model.model.layers, device)
    return train(model, optimizer, device)


@scenario("LP701")
def other_seeds_without_wrapper(device: torch.device) -> Any:
    """L06: every rank initialises its own adapter."""
    inner = base()
    torch.manual_seed(dist.get_rank())
    model = lora(inner).to(device)
    return train(model, adamw(model), device)


@scenario("LP103", 2)
def merged_on_one_rank(device: torch.device) -> Any:
    """One rank merges its adapter in step 2."""
    model = ddp(lora(base(), modules_to_save=["lm_head"]).to(device), device, find_unused_parameters=True)

    def before(step: int) -> None:
        if step == 2 and dist.get_rank() == 1:
            model.module.merge_adapter()

    return train(model, adamw(model), device, before=before)


@scenario("LP701", 2)
def changed_on_one_rank(device: torch.device) -> Any:
    """One rank writes other values in step 2."""
    model = ddp(lora(base()).to(device), device)

    def before(step: int) -> None:
        if step == 2 and dist.get_rank() == 1:
            for name, tensor in model.named_parameters():
                if "lora_" in name:
                    tensor.data.normal_()

    return train(model, adamw(model), device, before=before)


# --- result -------------------------------------------------------------------------------------


def judged(name: str, device: torch.device) -> dict[str, Any]:
    """Run one scenario; it passes if this rank reports what is expected, and nothing else."""
    run, code, step = SCENARIOS[name]
    began = time.perf_counter()
    try:
        report = run(device)
    except Exception as error:
        return {"ok": False, "why": f"{type(error).__name__}: {error}"[:2000], "seconds": time.perf_counter() - began}
    found = [(f.code, f.step) for f in report.with_status("fail", "warn")]
    ok = found == ([(code, step)] if code else []) and not report.internal_errors
    why = "" if ok else f"found {found}, expected {code or 'nothing'}; {report.internal_errors}"[:2000]
    return {"ok": ok, "why": why, "seconds": time.perf_counter() - began}


def exchange_milliseconds(times: int = 200) -> float:
    """Median time of one exchange between ranks that wait for nobody."""
    ranks = Ranks()
    ranks.enter()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        ranks.exchange(b"x" * SIZE, in_need=False)
        taken.append(1e3 * (time.perf_counter() - began))
    ranks.close()
    return statistics.median(taken)


def main() -> None:
    """Run everything, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="use the processor and gloo")
    parser.add_argument("--only", nargs="*", default=list(SCENARIOS), help="names of scenarios")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available() and not arguments.cpu
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder = Path(tempfile.gettempdir()) / f"ranks-{os.environ['MASTER_PORT']}-{os.getppid()}"
    folder.mkdir(exist_ok=True)

    def meet(name: str) -> None:  # a group for each run: a collective that one has left incomplete is none of the next
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"file://{folder}/{name}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )

    results: dict[str, Any] = {}
    for name in arguments.only:
        meet(name)
        mine = judged(name, device)
        dist.destroy_process_group()
        meet(f"{name}-result")
        everybody: list[Any] = [None] * world
        dist.all_gather_object(everybody, mine)
        dist.destroy_process_group()
        results[name] = {
            "passed": all(one["ok"] for one in everybody),
            "seconds": round(max(one["seconds"] for one in everybody), 2),
            **({} if all(one["ok"] for one in everybody) else {"why": [one["why"] for one in everybody]}),
        }
        if rank == 0:
            print(name, results[name], flush=True)
    meet("exchange")
    cost = exchange_milliseconds()
    backend = dist.get_backend()
    dist.destroy_process_group()
    if rank == 0:
        kind = torch.cuda.get_device_name(device) if cuda else "cpu"
        packages = ("torch", "transformers", "peft", "bitsandbytes", "lora_probe_callbacks")
        written = {
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "devices": [kind] * world,
            "backend": backend,
            "passed": sum(one["passed"] for one in results.values()),
            "failed": sum(not one["passed"] for one in results.values()),
            "exchange_bytes": SIZE,
            "exchange_ms": round(cost, 3),
            "runs": results,
        }
        path = Path(__file__).parent / "results" / f"ranks-{kind.lower().replace(' ', '-')}.json"
        path.write_text(json.dumps(written, indent=2) + "\n")
        print(f"{written['passed']} passed, {written['failed']} failed, exchange {cost:.2f} ms: {path.name}")


if __name__ == "__main__":
    main()
