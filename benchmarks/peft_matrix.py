"""PEFT's own custom-model matrix under the probe: every kind of layer and every tuner that PEFT tests.

    make peft-matrix

Takes ``TEST_CASES`` of ``tests/test_custom_models.py`` from PEFT's source distribution, of the version that
is installed, into a temporary folder. Each model is built as PEFT's test does it, on PEFT's own input and loss,
and trained twice for six steps from the same seed, with the monitor and without it. Writes
``benchmarks/results/peft-matrix.json``. Needs a package index for PEFT's sources, and diffusers and scikit-learn,
which PEFT's test module and its AdaMSS import.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lora_probe_callbacks import LoraProbeMonitor

STEPS = 6
RATE = 1e-3
# What is wrong in PEFT itself: LoRA of nn.MultiheadAttention applies the adapter of out_proj twice, and its
# gradient knows of one.
KNOWN = {("MHA", "LP307"): "https://github.com/huggingface/peft/pull/3774"}


@contextlib.contextmanager
def sources(version: str) -> Iterator[Path]:
    """PEFT's source distribution, unpacked for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        wanted = ["--no-binary", ":all:", "--no-deps", "--dest", folder, f"peft=={version}"]
        subprocess.run([*pip, *wanted], check=True)
        with tarfile.open(next(Path(folder).glob("peft-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder, f"peft-{version}")


def build(tests: ModuleType, case: tuple[str, str, type, dict[str, Any]]) -> tuple[nn.Module, Tensor]:
    """The model and the input that PEFT's own training tests give to one case."""
    _, name, kind, settings = case
    base = tests.MockTransformerWrapper.from_pretrained(name)
    model = peft.get_peft_model(base, kind(base_model_name_or_path=name, **settings))
    return model.train(), torch.arange(90).view(9, 10)


def train(model: nn.Module, inputs: Tensor, around: Callable[..., Any]) -> Any:
    """Six steps on the sum of the outputs, as PEFT's tests train; returns what was entered around them."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    with around(model, optimizer) as entered:
        for _ in range(STEPS):
            loss = model(X=inputs).sum()
            if getattr(model.peft_config["default"], "monteclora_config", None) is not None:
                loss = loss + model._get_monteclora_loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return entered


def watched(model: nn.Module, optimizer: torch.optim.Optimizer) -> LoraProbeMonitor:
    """A monitor that stops nothing and prints nothing."""
    return LoraProbeMonitor(model, optimizer, every_n_steps=1, on_failure="warn", verbose=False)


def alone(model: nn.Module, optimizer: torch.optim.Optimizer) -> contextlib.nullcontext[None]:
    """No monitor."""
    return contextlib.nullcontext()


def run(tests: ModuleType, case: tuple[str, str, type, dict[str, Any]]) -> dict[str, Any]:
    """One row: what was found in one case, and whether the training was left as it is."""
    title, name, kind, _ = case
    row: dict[str, Any] = {"case": title, "model": name, "tuner": kind.__name__, "lora": kind is peft.LoraConfig}
    try:
        model, inputs = build(tests, case)
        train(model, inputs, alone)
    except Exception as error:  # without the probe: PEFT's or torch's own
        return {**row, "outcome": "does not train", "error": f"{type(error).__name__}: {error}"}
    other, inputs = build(tests, case)
    try:
        report = train(other, inputs, watched).report
    except Exception as error:
        return {**row, "outcome": "crash", "error": f"{type(error).__name__}: {error}"}
    statuses = collections.Counter(f.status for f in report.findings)
    bad = [f"{f.code} {f.status}: {f.message}" for f in report.with_status("fail", "warn")]
    known = [KNOWN.get((name, f.code)) for f in report.with_status("fail", "warn")]
    outcome = "fail" if statuses["fail"] else "warn" if statuses["warn"] else "quiet"
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return {
        **row,
        "outcome": "fault of PEFT" if known and all(known) else outcome,
        "passed": statuses["pass"],
        **({"found": bad} if bad else {}),
        **({"known": known} if any(known) else {}),
        **({"internal_errors": report.internal_errors} if report.internal_errors else {}),
        "unchanged": all(a == b and _equal(x, y) for (a, x), (b, y) in pairs),
    }


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) if isinstance(a, Tensor) else a == b


def main(arguments: list[str] | None = None) -> None:
    """Run all cases, print what is not quiet, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose title contains this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "peft-matrix.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PEFT's own, of what its cases are about
    rows = []
    with sources(version("peft")) as root:
        sys.path.append(str(root))
        tests = importlib.import_module("tests.test_custom_models")
        for case in tests.TEST_CASES:
            if options.only not in case[0]:
                continue
            with contextlib.redirect_stdout(io.StringIO()):
                row = run(tests, case)
            rows.append(row)
            if row["outcome"] != "quiet" or not row["unchanged"] or "internal_errors" in row:
                print(json.dumps(row, indent=1))
    result = {
        "versions": {p: version(p) for p in ("torch", "peft", "transformers")},
        "steps": STEPS,
        "lora": summary([r for r in rows if r["lora"]]),
        "other tuners": summary([r for r in rows if not r["lora"]]),
        "rows": rows,
    }
    print(json.dumps({k: result[k] for k in ("lora", "other tuners")}, indent=1))
    if not options.only:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def summary(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Number of cases by outcome."""
    outcomes = collections.Counter(r["outcome"] for r in rows)
    return {
        "cases": len(rows),
        **{o: outcomes[o] for o in ("quiet", "warn", "fail", "fault of PEFT", "crash", "does not train")},
        "changed by the probe": sum(not r.get("unchanged", True) for r in rows),
        "errors inside": sum("internal_errors" in r for r in rows),
    }


if __name__ == "__main__":
    main()
