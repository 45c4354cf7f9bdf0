"""How sure LP307, LP309 and LP310 are: healthy trainings in which a finite difference is hard, and wrong gradients.

    python benchmarks/gradients.py

Healthy: small models of six families in four precisions, shallow and deep, with small and with large weights, six
seeds each; and Llamas with rsLoRA, DoRA, large adapters, a large learning rate, dropout, checkpointing, 8 and 4 bits,
a vocabulary of 152,000, and two parameters over one storage. Any report is a false alarm. Wrong: Llamas with one fault
each, in the same precisions; a fault counts as found if a check fails within twenty steps, in which each tensor has had
its turn. Writes ``benchmarks/results/gradients.json``; ``--part 2/8`` makes one part of the runs, and what parts have
written is put together by ``--join``.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from lora_probe_callbacks import LoraProbeMonitor
from lora_probe_callbacks.observe.forward.replay import KeptForward

STEPS, SEEDS, PASSES = 20, 6, 4
CHECKS = ["LP307", "LP309", "LP310"]
PRECISIONS = ("float32", "bf16 autocast", "bf16", "fp16 scaled")
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", _HEADS),
    "GPT-2": ("GPT2LMHeadModel", {"n_head": 4, "n_inner": 64}),
    "OPT": ("OPTForCausalLM", {"num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1}),
    "Gemma": ("GemmaForCausalLM", {**_HEADS, "head_dim": 8}),
    "Mixtral": ("MixtralForCausalLM", {**_HEADS, "num_local_experts": 4}),
    "T5": ("T5ForConditionalGeneration", {"num_heads": 4, "d_kv": 8, "d_ff": 64, "decoder_start_token_id": 0}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "rsLoRA, r=16": {"use_rslora": True, "r": 16},
    "DoRA": {"use_dora": True},
    "adapter as large as the weights": {"std": 0.3},
    "learning rate 0.1": {"rate": 0.1},
    "dropout of half": {"lora_dropout": 0.5},
    "checkpointing": {"checkpointing": True, "lora_dropout": 0.3},
    "vocabulary of 152,000": {"vocabulary": 152_000},
    "tied storage": {"tied": True},
}
FAULTS = (
    "another dropout recomputed",
    "backward halved",
    "backward doubled",
    "MLPs detached",
    "activation of another",
    "wrong in some tensors",
    "zeroed per micro-batch",
    "never zeroed",
    "loss outside",
)


@dataclass
class Run:
    """One training, described by what was built and what came of it."""

    family: str = "Llama"
    precision: str = "float32"
    layers: int = 2
    weights: float = 0.02
    seed: int = 0
    variant: str = ""
    fault: str = ""
    status: str = ""
    message: str = ""
    ratios: list[float | None] = field(default_factory=list)
    forwards: int = 0

    @property
    def reported(self) -> bool:
        """A check failed or warned."""
        return self.status in ("fail", "warn")


# --- models -------------------------------------------------------------------------------------


def base(run: Run, width: int = 32) -> nn.Module:
    """A model of this family, some ten thousand parameters a layer."""
    kind, settings = FAMILIES[run.family]
    model = getattr(transformers, kind)
    std = "initializer_factor" if run.family == "T5" else "initializer_range"
    names = {"GPT-2": ("n_embd", "n_layer"), "T5": ("d_model", "num_layers")}
    wide, deep = names.get(run.family, ("hidden_size", "num_hidden_layers"))
    vocabulary = VARIANTS.get(run.variant, {}).get("vocabulary", 64)
    sizes = {
        "vocab_size": vocabulary,
        wide: width,
        deep: run.layers,
        std: run.weights * (10 if run.family == "T5" else 1),
    }
    if run.family in ("Llama", "Gemma", "Mixtral"):
        sizes["intermediate_size"] = 2 * width
    made = model(model.config_class(use_cache=False, pad_token_id=0, **sizes, **settings))
    return made.to(torch.bfloat16) if run.precision == "bf16" else made


def quantised(run: Run) -> nn.Module:
    """A Llama in 8 or 4 bits, prepared as the documentation says."""
    bits = (
        BitsAndBytesConfig(load_in_8bit=True)
        if run.variant == "8 bits"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    )
    with tempfile.TemporaryDirectory() as folder:
        base(run, width=64).save_pretrained(folder)
        kind = getattr(transformers, FAMILIES[run.family][0])
        made = kind.from_pretrained(folder, quantization_config=bits, device_map={"": "cpu"})
    return prepare_model_for_kbit_training(made, gradient_checkpointing_kwargs={"use_reentrant": False})


def adapted(run: Run) -> nn.Module:
    """The model with its adapter and its fault."""
    settings = dict(VARIANTS.get(run.variant, {}))
    for other in ("rate", "vocabulary"):
        settings.pop(other, None)
    tied = settings.pop("tied", False)
    std, checkpointing = settings.pop("std", 0.0), settings.pop("checkpointing", False)
    torch.manual_seed(run.seed)
    model = quantised(run) if run.variant.endswith("bits") else base(run)
    if run.fault == FAULTS[0]:
        settings["lora_dropout"] = 0.5
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if run.family == "Mixtral" else "all-linear"
    config = LoraConfig(**{"r": 4, "target_modules": targets, **settings})
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=run.precision != "bf16")
    for name, tensor in peft_model.named_parameters():
        if std and "lora_B" in name:
            nn.init.normal_(tensor, std=std)
    if tied:
        tie(peft_model.get_base_model().model.layers)
    if checkpointing or run.fault == FAULTS[0]:
        keeps = {"use_reentrant": False, "preserve_rng_state": not run.fault}
        peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keeps)
        peft_model.enable_input_require_grads()
    for number, layer in enumerate(peft_model.get_base_model().model.layers if run.fault else ()):
        if run.fault != FAULTS[5] or number == 1:
            break_(layer, run.fault)
    return peft_model.train()


def tie(layers: Any) -> None:
    """Let the adapters of all query projections share their storage, each with parameters of its own."""
    first = layers[0].self_attn.q_proj
    for layer in layers[1:]:
        for part in ("lora_A", "lora_B"):
            mine, shared = (getattr(x, part).default for x in (layer.self_attn.q_proj, first))
            mine.weight = nn.Parameter(shared.weight.data)


def scaled(x: Tensor, factor: float) -> Tensor:
    """The same numbers, and a gradient that is off by a factor."""
    return factor * x - ((factor - 1) * x).detach()


def break_(layer: Any, fault: str) -> None:
    """Give one layer of a Llama a wrong gradient and the right value."""
    attention, mlp = layer.self_attn, layer.mlp
    if fault in FAULTS[1:3]:
        factor, project = 0.5 if fault == FAULTS[1] else 2.0, attention.o_proj.forward
        attention.o_proj.forward = lambda x: scaled(project(x), factor)
    elif fault == FAULTS[3]:
        mlp.forward = lambda x, forward=mlp.forward: forward(x.detach())
    elif fault == FAULTS[4]:
        # SiLU, and the gradient of the identity.
        mlp.act_fn.forward = lambda x: nn.functional.silu(x).detach() + (x - x.detach())
    elif fault == FAULTS[5]:
        for part in (attention.v_proj.lora_A.default, attention.v_proj.lora_B.default):
            part.forward = lambda x, part=part: nn.functional.linear(x, scaled(part.weight, 2.0))


def loss_of(model: nn.Module, ids: Tensor, fault: str) -> Tensor:
    """The loss of one batch; outside the model where that is the fault, and half of its gradient is dropped there."""
    if fault != FAULTS[8]:
        return model(input_ids=ids, labels=ids).loss
    logits = model(input_ids=ids).logits[:, :-1].float()
    return nn.functional.cross_entropy(HalfDropped.apply(logits).flatten(0, 1), ids[:, 1:].flatten())


class HalfDropped(torch.autograd.Function):
    """A backward that forgets half of the vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:  # noqa: D102
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient * (torch.arange(gradient.shape[-1]) % 2)


# --- one training -----------------------------------------------------------------------------------


def train(run: Run) -> Run:
    """Train for some steps under the monitor, and write down what the checks said and how many forwards it took."""
    model = adapted(run)
    rate = VARIANTS.get(run.variant, {}).get("rate", 1e-3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    scaled, mixed = run.precision == "fp16 scaled", run.precision in ("bf16 autocast", "fp16 scaled")
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    calls, call = [], KeptForward.call
    KeptForward.call = lambda kept: (calls.append(1), call(kept))[1]  # type: ignore[method-assign]
    settings: Any = {"on_failure": "warn", "verbose": False, "select": CHECKS, "every_n_steps": 1}
    try:
        with LoraProbeMonitor(model, optimizer, scaler=scaler if scaled else None, **settings) as probe:
            for _ in range(STEPS):
                for _ in range(PASSES if run.fault == FAULTS[6] else 1):
                    ids = torch.randint(1, 64, (4, 16))
                    if run.fault == FAULTS[6]:
                        optimizer.zero_grad()
                    with torch.autocast("cpu", torch.float16 if scaled else torch.bfloat16, enabled=mixed):
                        loss = loss_of(model, ids, run.fault)
                    scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                if run.fault not in FAULTS[6:8]:
                    optimizer.zero_grad()
    finally:
        KeptForward.call = call  # type: ignore[method-assign]
    findings = [f for f in probe.report.findings if f.code in CHECKS]
    finding = min(findings, key=lambda f: (f.status not in ("fail", "warn"), f.code))
    run.status, run.message, run.forwards = finding.status, finding.message, len(calls)
    run.ratios = [
        r.central if r.central is None else round(r.central, 3) for r in probe._session._collector.looks.responses
    ]
    if probe.report.internal_errors:
        raise SystemExit(f"{run}: {probe.report.internal_errors}")
    return run


# --- all of them ------------------------------------------------------------------------------------


def healthy() -> Iterator[Run]:
    """What must stay quiet."""
    shapes = list(itertools.product((2, 12), (0.02, 0.2), range(SEEDS)))
    for family, precision in itertools.product(FAMILIES, PRECISIONS):
        for layers, weights, seed in shapes:
            yield Run(family, precision, layers, weights, seed)
    for variant, precision in itertools.product(VARIANTS, PRECISIONS):
        for weights, seed in itertools.product((0.02, 0.2), range(SEEDS // (6 if "vocabulary" in variant else 2))):
            yield Run("Llama", precision, 4, weights, seed, variant)
    for variant, precision, seed in itertools.product(("8 bits", "4 bits"), PRECISIONS[:2], range(SEEDS)):
        yield Run("Llama", precision, 2, 0.1, seed, variant)


def wrong() -> Iterator[Run]:
    """What should be found."""
    for fault, precision in itertools.product(FAULTS, PRECISIONS):
        for layers, weights, seed in itertools.product((2, 12), (0.02, 0.2), range(SEEDS // 2)):
            yield Run("Llama", precision, layers, weights, seed, "", fault)


def tell(runs: list[Run], by: Callable[[Run], tuple[str, ...]]) -> list[dict[str, Any]]:
    """Counts of each group, and the runs that went the other way."""
    rows = []
    for key in dict.fromkeys(map(by, runs)):
        group = [r for r in runs if by(r) == key]
        statuses = collections.Counter(r.status for r in group)
        forwards = sorted(r.forwards for r in group)
        rows.append(
            {
                "group": list(key),
                "runs": len(group),
                "reported": sum(r.reported for r in group),
                "statuses": dict(statuses),
                "median_forwards": forwards[len(forwards) // 2],
                "most_forwards": forwards[-1],
            }
        )
        print(f"{' / '.join(key):50} {len(group):4} runs, {rows[-1]['reported']:4} reported, {dict(statuses)}")
    return rows


def _quietly() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def _parts(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.stem}.part*.json"))


def _made(given: argparse.Namespace) -> tuple[list[Run], list[Run]]:
    """Train what was asked for."""
    number, parts = map(int, given.part.split("/"))
    with ProcessPoolExecutor(given.workers, initializer=_quietly) as pool:
        quiet, loud = (
            []
            if given.only == other
            else list(
                pool.map(train, [run for run in runs if given.match in str(run)][number - 1 :: parts], chunksize=4)
            )
            for other, runs in (("wrong", healthy()), ("healthy", wrong()))
        )
    return quiet, loud


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gradients.json")
    parser.add_argument("--only", choices=("healthy", "wrong"))
    parser.add_argument("--match", default="", help="only runs whose description holds this")
    parser.add_argument("--part", default="1/1", help="of the runs, such as 2/8: every eighth, from the second on")
    parser.add_argument("--join", action="store_true", help="put together what the parts have written")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    began = time.perf_counter()
    if given.join:
        read = [json.loads(path.read_text()) for path in _parts(given.out)]
        quiet, loud = ([Run(**run) for part in read for run in part[kind]] for kind in ("quiet", "loud"))
    else:
        quiet, loud = _made(given)
    if given.part != "1/1":
        runs = {"quiet": [asdict(r) for r in quiet], "loud": [asdict(r) for r in loud]}
        given.out.with_suffix(f".part{given.part.replace('/', '-')}.json").write_text(json.dumps(runs))
    result = {
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "healthy": tell(quiet, lambda r: (r.variant or r.family, r.precision)),
        "wrong": tell(loud, lambda r: (r.fault, r.precision)),
        "false_alarms": [asdict(r) for r in quiet if r.reported],
        "not_found": [asdict(r) for r in loud if not r.reported],
    }
    if given.part == "1/1":
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(*result["false_alarms"], sep="\n")
    print(
        f"{len(quiet)} healthy, {len(result['false_alarms'])} false alarms; {len(loud)} wrong, "
        f"{len(loud) - len(result['not_found'])} found; {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
