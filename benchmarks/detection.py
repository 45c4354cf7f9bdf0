"""Four ways to find a silent failure, side by side: the faults and the healthy matrix through each of them.

    make detection

- **lora_probe_callbacks**: ``LoraProbeMonitor`` around the loop, probing every step, with what the run declares. A
  fault counts as found only if the right check reports it and nothing else does; any failure or warning of a healthy
  run is a false alarm.
- **guardtower** (PyPI): ``guardtower.audit(model, step_fn, optimizer=optimizer)`` as its documentation says;
  it makes the forward and the backward of the step. Documented for the first batch; on the faults it is run at every
  step, so that none begins too late for it, and on healthy runs at the first batch alone. Its warning of the fraction
  of trainable parameters is not counted: the models are tiny.
- **get_model_status** of PEFT: called before and after the forward of every step. A state that is "irregular",
  disabled, merged, or in which the adapter that should train is inactive or frozen counts.
- **folk check**: after the backward, a trainable tensor without a gradient; after the step, one that is unchanged. On
  the faults from the second step on (at the first, every lora_A has a gradient of zero), on healthy runs at the second.

For these three any alarm in a run with a fault counts as found, whatever its reason; an exception of the run itself
does not, unless the tool reports it. Writes ``benchmarks/results/detection.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_probe_callbacks import LoraProbeError, LoraProbeMonitor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.doors import autocast, fit_plain, new_scaler
from support.matrix import CASES, Case
from support.recipes import RECIPES, Recipe
from support.training import Training, batches

STEPS = 8


# --- the tools ------------------------------------------------------------------------------------


class Tool:
    """A tool that a loop calls: what it says of each step.

    Args:
        intended: Names of the adapters that should train, if the run says so.
    """

    name = ""
    moments = range(STEPS)  # steps at which it is called on a healthy run

    def __init__(self, intended: tuple[str, ...] = ()) -> None:
        self.intended = intended
        self.alarms: list[str] = []

    def backward(self, model: nn.Module, loss: Callable[[], Tensor], optimizer: Optimizer, step: int) -> None:
        """Make the forward and the backward of one step."""
        loss().backward()

    def after_step(self, model: nn.Module, step: int) -> None:
        """The step was made, and no gradient was cleared yet."""


class Guardtower(Tool):
    """``guardtower.audit``."""

    name = "guardtower"
    moments = range(1)

    def backward(self, model: nn.Module, loss: Callable[[], Tensor], optimizer: Optimizer, step: int) -> None:
        """Let the audit make them."""
        import guardtower

        if step not in self.moments:
            super().backward(model, loss, optimizer, step)
            return
        report = guardtower.audit(model, loss, optimizer=optimizer)
        found = [*report.errors, *report.warnings]
        self.alarms += [f"{f.check}: {f.message}"[:200] for f in found if f.check != "lora_trainable_pct"]


class ModelStatus(Tool):
    """PEFT's ``get_model_status``."""

    name = "get_model_status"

    def backward(self, model: nn.Module, loss: Callable[[], Tensor], optimizer: Optimizer, step: int) -> None:
        """Look at the state around the forward."""
        self._look(model)
        value = loss()
        self._look(model)
        value.backward()

    def _look(self, model: nn.Module) -> None:
        adapted = next((m for m in model.modules() if isinstance(m, peft.PeftModel)), model)
        try:
            status = peft.get_model_status(adapted)
        except (TypeError, ValueError) as error:  # not a model that it knows, or one without adapters
            self.alarms += [f"{type(error).__name__}: {error}"[:200]] if isinstance(error, ValueError) else []
            return
        parts = ("enabled", "active_adapters", "merged_adapters", "available_adapters")
        self.alarms += [f"{part} irregular" for part in parts if getattr(status, part) == "irregular"]
        if status.enabled is False:
            self.alarms.append("disabled")
        if status.merged_adapters:
            self.alarms.append(f"merged {status.merged_adapters}")
        for name in self.intended or status.active_adapters:
            if name not in status.active_adapters:
                self.alarms.append(f"{name} inactive")
            if status.requires_grad.get(name) is not True:
                self.alarms.append(f"{name} requires_grad {status.requires_grad.get(name)}")


class Folk(Tool):
    """Gradient None after the backward, parameter unchanged after the step."""

    name = "folk check"
    moments = range(1, 2)

    def backward(self, model: nn.Module, loss: Callable[[], Tensor], optimizer: Optimizer, step: int) -> None:
        """Look at the gradients."""
        super().backward(model, loss, optimizer, step)
        self.before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        if step in self.moments:
            self.alarms += [
                f"{n}: gradient None" for n, p in model.named_parameters() if n in self.before and p.grad is None
            ]

    def after_step(self, model: nn.Module, step: int) -> None:
        """Look at the values."""
        if step in self.moments:
            self.alarms += [f"{n}: unchanged" for n, p in model.named_parameters() if _same(self.before.get(n), p)]


def _same(before: Tensor | None, now: Tensor) -> bool:
    return before is not None and before.shape == now.shape and torch.equal(before, now)


def at_every_step(tool: type[Tool], first: int) -> type[Tool]:
    """The same tool, called at every step from ``first`` on."""
    return type(tool.__name__, (tool,), {"moments": range(first, 1000)})


# --- faults ---------------------------------------------------------------------------------------


def drive(run: Training, tool: Tool, steps: int) -> list[str]:
    """The loop of ``doors.fit_plain``, with a tool in the place of the probe; return its alarms."""
    optimizer = run.built_optimizer()
    scheduler = None if run.scheduler is None else run.scheduler(optimizer)
    scaler = new_scaler(run)
    run.model.train()

    def loss(batch: Tensor, number: int) -> Tensor:
        with autocast(run.precision):
            value = run.loss(run.model, batch, number) / run.accumulate
        return value if scaler is None else scaler.scale(value)

    with run.around():
        for number, batch in enumerate(batches(steps * run.accumulate)):
            run.between_steps(run, number)
            tool.backward(run.model, partial(loss, batch, number), optimizer, number)
            if (number + 1) % run.accumulate:
                continue
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            tool.after_step(run.model, number)
            optimizer.zero_grad(set_to_none=run.set_to_none)
            if scheduler is not None:
                scheduler.step()
    return tool.alarms


def fault_row(recipe: Recipe, tools: list[type[Tool]]) -> dict[str, Any]:
    """What each tool says of one fault."""
    row: dict[str, Any] = {"fault": recipe.name, "expected": recipe.code}
    found = _ours(recipe)
    row["lora_probe_callbacks"] = {"found": found == [recipe.code], "said": found}
    named = recipe.intent.get("adapter", ())
    for tool in tools:
        watching = at_every_step(tool, first=1 if tool is Folk else 0)((named,) if isinstance(named, str) else named)
        try:
            run = recipe.build()
            drive(run, watching, recipe.steps)
        except Exception as error:
            row["loud"] = f"{type(error).__name__}: {error}"[:200]
        said = list(dict.fromkeys(watching.alarms))
        row[tool.name] = {"found": bool(said), "said": said[:3]}
    return row


def _ours(recipe: Recipe) -> list[str]:
    run = recipe.build()
    scaler = new_scaler(run)
    try:
        probe = LoraProbeMonitor(
            run.model, run.built_optimizer(), scaler=scaler, every_n_steps=1, verbose=False, **recipe.intent
        )
    except ValueError as error:
        return [str(error)]
    try:
        fit_plain(run, probe, recipe.steps, scaler)
    except LoraProbeError:
        pass
    except Exception as error:
        logging.getLogger(__name__).debug("%s", error)
    return [f.code for f in probe.report.with_status("fail", "warn")]


# --- healthy runs ---------------------------------------------------------------------------------


def healthy_row(case: Case, tools: list[type[Tool]], folder: Path) -> dict[str, Any]:
    """What each tool says of one healthy run."""
    row: dict[str, Any] = {"case": case.name, "lora": case.lora}
    probe = case.make(folder).fit(
        lambda model, optimizer: LoraProbeMonitor(
            model, optimizer, every_n_steps=1, on_failure="warn", verbose=False, **case.intent
        )
    )
    said = [f"{f.code}: {f.message}" for f in probe.report.with_status("fail", "warn")]
    row["lora_probe_callbacks"] = {"alarm": bool(said), "said": said}
    named = case.intent.get("adapter", ())
    for tool in tools:
        watching = tool((named,) if isinstance(named, str) else named)
        run = case.make(folder)
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(1)
        optimizer = run.optimizer(run.model)
        for step in range(run.steps):
            ids = torch.randint(3, 32, (2, 8), generator=generator)
            try:
                watching.backward(run.model, partial(run.loss, run.model, ids, step), optimizer, step)
                optimizer.step()
                watching.after_step(run.model, step)
                optimizer.zero_grad()
                run.after_step(run.model, step)
            except Exception as error:  # the run is healthy: it was the tool
                watching.alarms.append(f"crash: {type(error).__name__}: {error}"[:200])
                break
        said = list(dict.fromkeys(watching.alarms))
        row[tool.name] = {"alarm": bool(said), "said": said[:3]}
    return row


def counts(tool: str, faults: list[dict[str, Any]], healthy: list[dict[str, Any]]) -> dict[str, int]:
    """One line of the table. guardtower says nothing of tuners other than LoRA, so they are counted apart."""
    return {
        "found": sum(row[tool]["found"] for row in faults),
        "missed": sum(not row[tool]["found"] for row in faults),
        "false alarms, LoRA": sum(row[tool]["alarm"] for row in healthy if row["lora"]),
        "false alarms, other tuners": sum(row[tool]["alarm"] for row in healthy if not row["lora"]),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run everything, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "detection.json")
    parser.add_argument("--only", default="", help="faults and cases whose name contains this")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tools: list[type[Tool]] = [Guardtower, ModelStatus, Folk]
    not_run = {}
    try:
        import guardtower  # noqa: F401
    except ImportError as error:
        not_run["guardtower"] = f"{type(error).__name__}: {error}"
        tools = tools[1:]
    faults = [fault_row(recipe, tools) for recipe in RECIPES if options.only in recipe.name]
    with tempfile.TemporaryDirectory() as folder:
        healthy = [healthy_row(case, tools, Path(folder)) for case in CASES if options.only in case.name]
    names = ["lora_probe_callbacks", *(tool.name for tool in tools)]
    table = {name: counts(name, faults, healthy) for name in names}
    print(f"{len(faults)} faults and {len(healthy)} healthy runs")
    for name, row in table.items():
        print(f"{name:22}", ", ".join(f"{key} {value}" for key, value in row.items()))
    missed = [row["fault"] for row in faults if not row["lora_probe_callbacks"]["found"]]
    print(f"missed by lora_probe_callbacks: {missed}")
    result = {
        "how": __doc__,
        "versions": {p: _version(p) for p in ("torch", "peft", "transformers", "guardtower")},
        "not run": not_run,
        "faults": len(faults),
        "healthy": {"of LoRA": sum(r["lora"] for r in healthy), "of other tuners": sum(not r["lora"] for r in healthy)},
        "table": table,
        "rows": {"faults": faults, "healthy": healthy},
    }
    if not options.only:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
