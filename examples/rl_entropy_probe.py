"""Does the entropy of a policy fall, and would other prompts say the same? Asked at every step of a GRPO-style run.

A tiny Llama that can count (`3 5 7 9 ...`) gets a LoRA adapter and policy-gradient steps on prompts U, eight
responses to each. A `VarianceProbe` is attached to the loop, which is otherwise unchanged: for every step it
predicts, on other prompts E, the first-order change of the entropy surrogate, `delta_1`, with its interval over
prompts. Beside it stands the change that the step made on a third set H, with an interval of its own. The probe
also sees to it that this estimator depends on the adapter that trains.

    python examples/rl_entropy_probe.py [--plot runs/rl_entropy_probe.png] [--record runs/rl_entropy_probe.jsonl]
    lora-probe report runs/rl_entropy_probe.jsonl --html runs/rl_entropy_probe.html
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import NamedTuple

import torch
from entropy_change import base_model, policy_loss, sampled
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lora_probe_callbacks import LoraProbeMonitor
from lora_probe_callbacks.estimators import (
    PromptBatch,
    VarianceProbe,
    entropy_surrogate,
    sequence_logprobs,
)

STEPS, LEARNING_RATE = 16, 1e-3
PROMPTS = {"U": 24, "E": 24, "H": 48}  # in a step


class Row(NamedTuple):
    """One step: what was predicted on E and what happened on H, in nats per token of the budget."""

    delta_1: float
    low: float
    high: float
    measured: float
    noise: float  # standard error of what was measured, over the prompts of H
    apart: float  # measured minus predicted, in standard errors of both
    signal_to_noise: float
    cosine: float


def surrogate(model: nn.Module, E: PromptBatch) -> Tensor:
    """Return `L_X`, whose gradient is that of the entropy, one entry for each prompt."""
    return entropy_surrogate(sequence_logprobs(model, E, adapter="default"), E)


class Measured:
    """The change of the surrogate on H: its weights are those of the policy before the step."""

    def __init__(self, model: nn.Module, H: PromptBatch) -> None:
        self.H = H
        self.before = self._log_probs(model).requires_grad_()
        (self.weights,) = torch.autograd.grad(entropy_surrogate(self.before, H).mean(), self.before)

    def _log_probs(self, model: nn.Module) -> Tensor:
        return sequence_logprobs(model, self.H, adapter="default").detach()

    def change(self, model: nn.Module) -> tuple[float, float]:
        """Return what has changed since, and its standard error over the prompts."""
        by_prompt = len(self.before) * (self.weights * (self._log_probs(model) - self.before.detach())).sum(1)
        return float(by_prompt.mean()), float(by_prompt.std() / len(by_prompt) ** 0.5)


def train(model: PeftModel, pools: dict[str, list[tuple[int, int, int]]], record: Path) -> list[Row]:
    """Train with the estimator attached."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    batch: dict[str, PromptBatch] = {}
    logged: dict[int, dict[str, float]] = {}
    estimator = VarianceProbe(lambda step: batch["E"], surrogate, direction="from_optimizer_step", every_n_steps=1)
    rows = []
    with LoraProbeMonitor(
        model,
        optimizer,
        estimator=estimator,
        record=record,
        verbose=False,
        log=lambda metrics, step: logged.setdefault(step, {}).update(metrics),
    ) as probe:
        for step in range(STEPS):
            # Responses of the policy as it is: an entropy surrogate on older ones would be of another policy.
            batch |= {name: sampled(model, random.sample(pools[name], n)) for name, n in PROMPTS.items()}
            held_out = Measured(model, batch["H"])
            policy_loss(model, batch["U"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            rows.append(row(logged[step], *held_out.change(model)))
    assert probe.report.healthy, probe.report
    return rows


def row(metrics: dict[str, float], measured: float, noise: float) -> Row:
    """Put the numbers of one step together."""
    names = ("delta_1", "standard_error", "lower", "upper")
    found = {name: metrics[f"lora_probe/estimator/{name}"] for name in names}
    apart = (measured - found["delta_1"]) / math.hypot(found["standard_error"], noise)
    more = [metrics[f"lora_probe/estimator/{name}"] for name in ("signal_to_noise", "cosine")]
    return Row(found["delta_1"], found["lower"], found["upper"], measured, noise, apart, *more)


def main() -> None:
    """Train, and show."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--plot", type=Path, default=Path("runs/rl_entropy_probe.png"))
    arguments.add_argument("--record", type=Path, default=Path("runs/rl_entropy_probe.jsonl"))
    options = arguments.parse_args()
    options.record.unlink(missing_ok=True)
    torch.set_num_threads(1)  # the matrices are too small for more
    torch.manual_seed(0)
    random.seed(0)
    tasks = [(start, step, length) for start in range(16) for step in range(1, 6) for length in (2, 3, 4)]
    random.shuffle(tasks)
    pools = {"U": tasks[:80], "E": tasks[80:160], "H": tasks[160:]}
    base = base_model()
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = train(get_peft_model(base, lora).double(), pools, options.record)
    show(rows)
    draw(rows, options.plot)


def show(rows: list[Row]) -> None:
    """Print the table."""
    table = Table(title="Change of the entropy surrogate by each step, 0.001 nats per token")
    for column in ("step", "delta_1 on E", "its 95% interval", "measured on H", "apart", "signal to noise", "cosine"):
        table.add_column(column, justify="right", no_wrap=column in ("its 95% interval", "measured on H"))
    for step, row in enumerate(rows):
        table.add_row(
            str(step),
            f"{1e3 * row.delta_1:+.2f}",
            f"{1e3 * row.low:+.2f} .. {1e3 * row.high:+.2f}",
            f"{1e3 * row.measured:+.2f} ± {1e3 * row.noise:.2f}",
            f"{row.apart:+.1f}",
            f"{row.signal_to_noise:.1f}",
            f"{row.cosine:+.2f}",
        )
    Console().print(table)
    predicted, measured = sum(row.delta_1 for row in rows), sum(row.measured for row in rows)
    agree = sum(abs(row.apart) <= 2 for row in rows)
    alone = sum(row.low > 0 or row.high < 0 for row in rows)
    print(f"All steps together: predicted {predicted:+.4f}, measured {measured:+.4f} nats per token.")
    print(f"They agree within two standard errors of both in {agree} of {len(rows)} steps.")
    print(f"The sign of a single step is sure (its interval excludes 0) in {alone}: {PROMPTS['E']} prompts are few.")


def draw(rows: list[Row], path: Path) -> None:
    """Plot the table, if matplotlib is there."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("No plot: matplotlib is not installed (pip install matplotlib).")
        return
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    steps = range(len(rows))
    figure, (change, noise) = plt.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    change.axhline(0, color="gray", linewidth=0.8)
    change.fill_between(
        steps, [r.low for r in rows], [r.high for r in rows], alpha=0.2, label="95% interval over the prompts of E"
    )
    change.plot(steps, [r.delta_1 for r in rows], label="predicted on E, delta_1")
    bars, values = [2 * r.noise for r in rows], [r.measured for r in rows]
    style = {"color": "black", "markersize": 4, "elinewidth": 1, "capsize": 2}
    change.errorbar(steps, values, bars, fmt="o", label="measured on H, two standard errors", **style)
    change.set_ylabel("change of the surrogate\nby one step (nats per token)")
    change.legend()
    noise.bar(steps, [r.signal_to_noise for r in rows], color="tab:blue", alpha=0.5)
    noise.axhline(2, color="gray", linewidth=0.8, linestyle=":")
    noise.set_ylabel("|delta_1| /\nstandard error")
    noise.set_xlabel("step")
    noise.set_xticks(range(0, len(rows), 3))
    figure.suptitle("Change of the policy's entropy by each step: predicted on some prompts, measured on others")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Plot: {path}")


if __name__ == "__main__":
    main()
