"""Mutants of training scripts: is a run that does not train ever called healthy, and a run that trains ever disturbed?

    make loop-mutants

Every script of ``benchmarks/loops`` is changed by machine (``loop_mutations.py``), one change at a time, and run three
times in processes of its own: without the probe, with it at its default cadence, and with ``every_n_steps=1``. The
truth is measured without the probe, against the unchanged script with the same seeds. What the unchanged script trains
is what should train. Of a mutant, then, one of these holds:

- **unchanged**: the adapter is bit-equal before every batch and at the end;
- **dead**: all of it stands still, from the start or for the last 16 steps at least; **partly dead**: some tensors do;
- **declared**: what stands still required no gradient, or did not exist, when training began: the script says so;
- **bent**: every tensor moves, and ends elsewhere;
- **crashed**, **endless**: it ends with an exception, or not in time; not counted.

Wanted: no dead run called healthy, and nothing said about an unchanged one. The results must be the same with the
probe as without it. Writes ``benchmarks/results/loop-mutants.json``; a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import copy
import difflib
import hashlib
import json
import os
import pickle
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import peft
import torch
import transformers
from torch import nn
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lora_probe_callbacks import LoraProbe, LoraProbeMonitor, LoraProbeTrainerCallback, ProbeReport

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "loops"))

from loop_mutations import Mutant, sample

LOOPS = Path(__file__).parent / "loops"
SCRIPTS = {path.stem: path.read_text() for path in sorted(LOOPS.glob("*.py")) if path.stem != "small"}
TRAINED = {"lightning": "module.model", "transformers": "trainer.model"}  # else "model"
LIMIT = 30.0  # seconds for one run
STILL = 16  # steps without a change, up to the end, after which a tensor counts as dead
ALIKE = 0.9  # cosine between the ways of two runs that came to about the same
CADENCES = {"default": None, "every step": 1}


# --- one run, in a process of its own -------------------------------------------------------------


@dataclass
class Run:
    """What one run of a script came to.

    Attributes:
        error: The exception that it ended with, or ``"endless"``.
        states: Before every batch of training, and at the end: tensor to a digest of its values.
        others: Likewise, one digest of the base model, its buffers and the random numbers.
        frozen: Tensors that required no gradient when training began.
        way: Tensor to how far it went from where training began, flat.
        finite: Whether the adapter is finite at the end.
        report: What the probe said.
        said: Warnings of the probe that Python was given.
        seconds: How long it took.
    """

    error: str = ""
    states: list[dict[str, str]] | None = None
    others: list[str] | None = None
    frozen: frozenset[str] = frozenset()
    way: dict[str, np.ndarray] | None = None
    finite: bool = True
    report: dict[str, Any] | None = None
    seconds: float = 0.0


class _Witness:
    """Looks at the adapter before every batch, without the probe's help."""

    def __init__(self, script: str, namespace: dict[str, Any]) -> None:
        self._path = TRAINED.get(script.split("_")[0], "model")
        self._namespace = namespace
        self.states: list[dict[str, str]] = []
        self.others: list[str] = []
        self.start: dict[str, np.ndarray] | None = None
        self.frozen: frozenset[str] = frozenset()

    def model(self) -> nn.Module:
        """What the script would save."""
        for path in (self._path, "model"):
            with contextlib.suppress(Exception):
                found = eval(path, self._namespace)
                if isinstance(found, nn.Module):
                    return found
        raise LookupError("no model")

    def adapter(self) -> dict[str, torch.Tensor]:
        named = self.model().named_parameters(remove_duplicate=False)
        return {_plain(n): p for n, p in named if "lora_" in n or "modules_to_save" in n}

    def begin(self) -> None:
        """Training begins."""
        tensors = self.adapter()
        self.start = {n: _values(p) for n, p in tensors.items()}
        self.frozen = frozenset(n for n, p in tensors.items() if not p.requires_grad)
        self.states, self.others = [], []
        self.look()

    def look(self) -> None:
        """One more state."""
        if self.start is None:
            return
        tensors = self.adapter()
        self.states.append({n: _digest(_values(p)) for n, p in tensors.items()})
        rest = {_plain(n): v for n, v in self.model().state_dict().items() if _plain(n) not in tensors}
        whole = hashlib.sha1(torch.get_rng_state().numpy().tobytes())
        for name, value in rest.items():
            whole.update(name.encode() + _values(value).tobytes())
        self.others.append(whole.hexdigest()[:12])

    def way(self) -> dict[str, np.ndarray]:
        now = {n: _values(p) for n, p in self.adapter().items()}
        start = self.start or {}
        return {n: now[n] - v for n, v in start.items() if n in now and now[n].shape == v.shape}


def _plain(name: str) -> str:
    """Without what wrappers write before it."""
    return re.sub(r"^((base_model\.model|module|_orig_mod)\.)*", "", name)


def _values(tensor: Any) -> np.ndarray:
    # A Tensor method under a mode that a mutant left on must not be counted as its own.
    with torch.no_grad():
        values: np.ndarray = tensor.detach().to(torch.float32).reshape(-1).numpy().copy()
    return values


def _digest(values: np.ndarray) -> str:
    return hashlib.sha1(values.tobytes()).hexdigest()[:12]


def execute(script: str, source: str, probe: int | bool | None) -> Run:
    """Run a script here and now.

    Args:
        script: Its name.
        source: Its text.
        probe: False without the probe, None with it at the default cadence, or the cadence.

    Returns:
        What came of it.
    """
    began = time.monotonic()
    namespace: dict[str, Any] = {"__name__": "__main__", "copy": copy, "torch": torch, "peft": peft}
    folder = tempfile.mkdtemp()
    namespace["FOLDER"] = folder
    namespace["LoraConfig"] = peft.LoraConfig
    witness = _Witness(script, namespace)
    probes: list[Any] = []
    with _doors(witness, probes, probe) as doors, _watched_batches(witness):
        namespace |= doors
        code = compile(_without_our_import(source), script, "exec")
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        run = Run()
        try:
            exec(code, namespace)
            witness.look()
            run.way = witness.way()
            run.finite = all(np.isfinite(v).all() for v in run.way.values())
        except Exception as error:
            run.error = f"{type(error).__name__}: {error}"[:300]
    run.states, run.others, run.frozen = witness.states, witness.others, witness.frozen
    if probe is not False:
        run.report = _said(probes[-1].report) if probes else None
    shutil.rmtree(folder, ignore_errors=True)
    run.seconds = time.monotonic() - began
    return run


def _without_our_import(source: str) -> str:
    tree = ast.parse(source)
    tree.body = [n for n in tree.body if not (isinstance(n, ast.ImportFrom) and n.module == "lora_probe_callbacks")]
    return ast.unparse(tree)


@contextlib.contextmanager
def _watched_batches(witness: _Witness) -> Iterator[None]:
    given = _BaseDataLoaderIter.__next__

    def watched(self: Any) -> Any:
        witness.look()
        return given(self)

    _BaseDataLoaderIter.__next__ = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        _BaseDataLoaderIter.__next__ = given  # type: ignore[method-assign]


@contextlib.contextmanager
def _doors(witness: _Witness, probes: list[Any], probe: int | bool | None) -> Iterator[dict[str, Any]]:
    """The three names that scripts use, with the probe behind them or without it."""
    settings = {"on_failure": "warn", "verbose": False} | ({"every_n_steps": probe} if probe else {})

    def monitor(*things: Any, **intent: Any) -> Any:
        witness.begin()
        if probe is False:
            return contextlib.nullcontext()
        probes.append(LoraProbeMonitor(*things, **intent, **settings))
        return probes[-1]

    def callback(ours: Callable[..., Any], kind: type) -> Callable[..., Any]:
        def make(**intent: Any) -> Any:
            witness.begin()
            if probe is False:
                return kind()
            probes.append(ours(**intent, **settings))
            return probes[-1]

        return make

    yield {
        "LoraProbeMonitor": monitor,
        "LoraProbe": callback(LoraProbe, pl.Callback),
        "LoraProbeTrainerCallback": callback(LoraProbeTrainerCallback, transformers.TrainerCallback),
    }


def _said(report: ProbeReport) -> dict[str, Any]:
    return {
        "status": report.status,
        "found": [[f.code, f.status, f.step, f.message] for f in report.with_status("fail", "warn")],
        **({"unproven": why} if (why := report.why_unproven()) else {}),
        **({"internal": report.internal_errors} if report.internal_errors else {}),
    }


def run_apart(script: str, source: str, probe: int | bool | None) -> Run:
    """The same in a process of its own, in limited time."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        warnings.simplefilter("ignore")
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        try:
            made = pickle.dumps(execute(script, source, probe))
        except BaseException as error:
            made = pickle.dumps(Run(error=f"{type(error).__name__}: {error}"[:300]))
        with os.fdopen(writing, "wb") as out:
            out.write(made)
        os._exit(0)
    os.close(writing)
    parts, ends = [], time.monotonic() + LIMIT
    while select.select([reading], [], [], max(0.0, ends - time.monotonic()))[0]:
        part = os.read(reading, 1 << 20)
        if not part:
            break
        parts.append(part)
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    os.waitpid(child, 0)
    try:
        found: Run = pickle.loads(b"".join(parts))
    except (EOFError, pickle.UnpicklingError):
        return Run(error="endless" if time.monotonic() >= ends else "the process died")
    return found


# --- the truth ------------------------------------------------------------------------------------


def idle(states: list[dict[str, str]], name: str) -> int:
    """How many states at the end a tensor stands still in; all if it never moved or is gone."""
    values = [state.get(name, "gone") for state in states]
    if values[-1] in ("gone", values[0]):
        return len(values)
    return next(n for n, value in enumerate(reversed(values)) if value != values[-1]) - 1


def truth(original: Run, mutant: Run) -> dict[str, Any]:
    """What a change did to the run, from two runs without the probe."""
    if mutant.error:
        return {"truth": "endless" if mutant.error == "endless" else "crashed", "error": mutant.error}
    if not mutant.states:
        return {"truth": "crashed", "error": "training did not begin"}
    if original.states is None or original.way is None or mutant.way is None:
        raise ValueError("got a run without states, expected one that ended")
    intended = [n for n, start in original.states[0].items() if original.states[-1][n] != start]
    moves = sum(a != b for a, b in zip(original.states, original.states[1:], strict=False))
    per_step = max(1.0, (len(original.states) - 1) / moves)
    found: dict[str, Any] = {}
    if mutant.others and original.others and mutant.others[-1] != original.others[-1]:
        found["others differ"] = True  # base weights, buffers or random numbers
    if not mutant.finite:
        found["not finite"] = True
    size, cosine = _compared(original.way, mutant.way, intended)
    found |= {"length": size, "cosine": cosine}
    if [_of(s, intended) for s in mutant.states] == [_of(s, intended) for s in original.states]:
        return {"truth": "unchanged", **found}
    rest = {n: idle(mutant.states, n) for n in intended}
    ends = {n: idle(original.states, n) for n in intended}
    still = [n for n in intended if rest[n] == len(mutant.states) or (rest[n] - ends[n]) / per_step >= STILL]
    if not still:
        same = [mutant.states[-1].get(n) == original.states[-1][n] for n in intended]
        return {"truth": "bent", **({"same end": True} if all(same) else {}), **found}
    absent = [n for n in intended if n not in mutant.states[0]]
    declared = {n for n in still if n in mutant.frozen or n in absent}
    late = all(rest[n] < len(mutant.states) for n in still)
    kind = "dead" if len(still) == len(intended) else "partly dead"
    first = max(len(mutant.states) - 1 - rest[n] for n in still) / per_step
    return {
        "truth": "declared" if declared == set(still) else kind,
        "of": kind,
        "still": f"{len(still)} of {len(intended)}: {', '.join(_short(n) for n in still[:4])}",
        **({"last moved at step": round(first)} if late else {}),
        **found,
    }


def _of(state: dict[str, str], names: list[str]) -> list[str | None]:
    return [state.get(n) for n in names]


def _short(name: str) -> str:
    return name.replace("model.layers.", "").replace("self_attn.", "").replace(".default", "").replace(".weight", "")


def _compared(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray], names: list[str]
) -> tuple[float | None, float | None]:
    """How far the mutant went, as a part of how far the original went, and the cosine between their ways."""
    a = np.concatenate([one[n] for n in names])
    b = np.concatenate([other[n] if n in other and other[n].shape == one[n].shape else 0 * one[n] for n in names])
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not all(np.isfinite(norms)) or not norms[1]:
        return (0.0 if norms[1] == 0.0 else None), None
    return round(norms[1] / norms[0], 3), round(float(a @ b) / norms[0] / norms[1], 3)


# --- one mutant -----------------------------------------------------------------------------------


def judge(mutant: Mutant, original: Run) -> dict[str, Any]:
    """Measure the truth of one mutant, and hear what the probe says."""
    row = {k: v for k, v in asdict(mutant).items() if k != "source"} | {"key": mutant.key}
    alone = run_apart(mutant.script, mutant.source, False)
    row |= truth(original, alone)
    if row["truth"] in ("crashed", "endless"):
        return row
    for name, cadence in CADENCES.items():
        watched = run_apart(mutant.script, mutant.source, cadence)
        said: dict[str, Any] = watched.report or {"status": "no report"}
        if watched.error:
            said["crash"] = watched.error
        if (watched.states, watched.others) != (alone.states, alone.others):
            said["changed by the probe"] = True
        row[name] = said
    row["verdict"] = verdict(row)
    return row


def verdict(row: dict[str, Any]) -> str:
    """``"ok"``, or what is wrong with what was said."""
    said = {name: row[name] for name in CADENCES}
    if any("crash" in s for s in said.values()):
        return "crash"
    if any("changed by the probe" in s for s in said.values()):
        return "changed"
    if any("internal" in s for s in said.values()):
        return "internal error"
    if row["truth"] == "unchanged":
        return "disturbed" if any(s["status"] != "healthy" or s["found"] for s in said.values()) else "ok"
    if row["truth"] in ("dead", "partly dead"):
        # At the default cadence nothing is looked at after the first steps of so short a run.
        seen = said.values() if row.get("last moved at step", 0) < 3 else [said["every step"]]
        return "missed" if any(s["status"] == "healthy" for s in seen) else "ok"
    return "ok"


# --- all ------------------------------------------------------------------------------------------


def originals(names: list[str]) -> dict[str, Run]:
    """The unchanged scripts, each of them repeatable and healthy."""
    found = {}
    for name in names:
        runs = [run_apart(name, SCRIPTS[name], probe) for probe in (False, False, None, 1)]
        for run in runs:
            if run.error or (run.states, run.others) != (runs[0].states, runs[0].others):
                raise RuntimeError(f"{name}: {run.error or 'not repeatable'}")
        for run in runs[2:]:
            if run.report is None or run.report["status"] != "healthy" or run.report["found"]:
                raise RuntimeError(f"{name}: {run.report}")
        found[name] = runs[0]
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures."""
    truths = collections.Counter(row["truth"] for row in rows)
    judged = [row for row in rows if "verdict" in row]
    table: dict[str, Any] = {"mutants": len(rows), "truth": dict(truths), "judged": len(judged)}
    for kind in ("dead", "partly dead", "declared", "bent", "unchanged"):
        mine = [row for row in judged if row["truth"] == kind]
        table[kind] = {
            "verdicts": dict(collections.Counter(row["verdict"] for row in mine)),
            **{name: dict(collections.Counter(_status(row[name]) for row in mine)) for name in CADENCES},
        }
    bent: dict[str, collections.Counter[str]] = {}
    for row in judged:
        if row["truth"] == "bent":
            kind = row["operator"] if row["operator"] == "constant" else f"{row['operator']}: {row['kind']}"
            told = any(row[name]["status"] != "healthy" or row[name]["found"] for name in CADENCES)
            aside = row["cosine"] is None or row["cosine"] < ALIKE
            bent.setdefault(kind, collections.Counter())[
                ("told" if told else "not told") + (", far" if aside else "")
            ] += 1
    table["bent, by kind"] = {kind: dict(bent[kind]) for kind in sorted(bent)}
    return table


def _status(said: dict[str, Any]) -> str:
    status: str = said["status"]
    warned = any(found[1] == "warn" for found in said.get("found", []))
    return status + (", warned" if warned and status != "unhealthy" else "")


def difference(mutant: Mutant) -> Iterator[str]:
    """What a mutant changes, as a diff of the script without its comments."""
    before = ast.unparse(ast.parse(SCRIPTS[mutant.script])).splitlines()
    return difflib.unified_diff(before, mutant.source.splitlines(), mutant.script, mutant.key, lineterm="")


def main(arguments: list[str] | None = None) -> None:
    """Run the mutants that were not run yet, print what is wrong, and write all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=1200, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="", help="scripts whose name contains this")
    parser.add_argument("--again", default="", help="keys of mutants to run once more, with commas")
    parser.add_argument("--show", default="", help="print what a mutant changes, by its key, and run nothing")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; go on next time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loop-mutants.json")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    scripts = {name: text for name, text in SCRIPTS.items() if options.only in name}
    chosen = sample(scripts, options.number, options.seed)
    if options.show:
        print("\n".join(difference(next(m for m in chosen if m.key == options.show))))
        return
    partial = options.out.with_suffix(".partial.jsonl")
    done = {}
    if partial.exists():
        done = {row["key"]: row for row in map(json.loads, partial.read_text().splitlines())}
    again = set(options.again.split(",")) - {""}
    left = [m for m in chosen if m.key not in done or m.key in again]
    if again:
        left = [m for m in left if m.key in again]
    unchanged = originals(sorted({m.script for m in left}))
    with partial.open("a") as out:
        for mutant in left:
            if time.monotonic() > ends:
                break
            row = judge(mutant, unchanged[mutant.script])
            done[mutant.key] = row
            out.write(json.dumps(row) + "\n")
            out.flush()
            if row.get("verdict", "ok") != "ok":
                print(row["verdict"], json.dumps({k: v for k, v in row.items() if k != "verdict"}), flush=True)
    rows = [done[m.key] for m in chosen if m.key in done]
    result = {
        "how": __doc__,
        "seed": options.seed,
        "versions": {p: version(p) for p in ("torch", "peft", "transformers", "lightning", "accelerate")},
        "table": summary(rows),
        "rows": rows,
    }
    print(json.dumps(result["table"], indent=1))
    if len(rows) == len(chosen) and not options.only and not again:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
