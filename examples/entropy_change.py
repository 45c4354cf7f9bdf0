"""How well is the change of the policy's entropy predicted by the first order, and how sure is it?

A tiny Llama learns to count (`3 5 7 9 ...`), gets a LoRA adapter and some steps of policy-gradient
training on prompts U. Then, for falling learning rates, the next AdamW step is predicted on other prompts
E: `delta_1`, the sum over all adapter tensors of gradient times step, with its standard error over
prompts. The step is taken, the change is measured, and the step is undone. Their ratio tends to 1.

    python examples/entropy_change.py [--plot runs/entropy_change.png]
"""

from __future__ import annotations

import argparse
import copy
import random
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_probe_callbacks.estimators import (
    ConditionalVariance,
    PromptBatch,
    UpdateDirection,
    entropy_surrogate,
    per_prompt_projection,
    policy_gradient_surrogate,
    refuse_shared_prompts,
    sequence_logprobs,
    skewed_interval,
)

NUMBERS, END, PAD = 16, 16, 17
LEARNING_RATES = [3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5]
BUDGET, RESPONSES = 8, 8  # tokens in a response at most; responses to each prompt


class Row(NamedTuple):
    """One learning rate: what was predicted and what came of it, in nats per token of the budget."""

    lr: float
    delta_1: float
    standard_error: float
    low: float
    high: float
    measured: float


def count(start: int, step: int, length: int) -> list[int]:
    """Return `start, start + step, ...` modulo 16."""
    return [(start + i * step) % NUMBERS for i in range(length)]


def base_model() -> LlamaForCausalLM:
    """Make a Llama of 70 thousand weights and teach it to count, not too well: some entropy must be left."""
    config = LlamaConfig(
        vocab_size=18,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    # float64: at the smallest learning rates the change is small against the rounding of float32.
    model = LlamaForCausalLM(config).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        rows = torch.tensor([[*count(random.randrange(16), random.randint(1, 5), 9), END] for _ in range(32)])
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def sampled(model: nn.Module, tasks: list[tuple[int, int, int]]) -> PromptBatch:
    """Answer each prompt, the first numbers of a count, some times over; every right number is a reward."""
    prompts = [count(*task) for task in tasks]
    longest = max(map(len, prompts))
    padded = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    rows = model.generate(
        input_ids=padded,
        attention_mask=(padded != PAD).long(),  # no text contains this padding token
        do_sample=True,
        max_new_tokens=BUDGET,
        num_return_sequences=RESPONSES,
    )
    texts = [row[: row.index(END) + 1] if END in row else row for row in rows[:, longest:].tolist()]
    responses = [texts[n * RESPONSES :][:RESPONSES] for n in range(len(prompts))]
    right = [[*count(start, step, 9)[length:], END] for start, step, length in tasks]
    reward = torch.tensor(
        [
            [sum(map(int.__eq__, text, answer)) / len(answer) for text in group]
            for group, answer in zip(responses, right, strict=True)
        ],
        dtype=torch.float64,
    )
    return PromptBatch.from_ragged(
        prompts, responses, pad_id=PAD, advantages=reward - reward.mean(1, keepdim=True), max_lengths=BUDGET
    )


def policy_loss(model: nn.Module, U: PromptBatch) -> Tensor:
    """Return the loss of the training loop: minus the mean of `L_Y`."""
    return -policy_gradient_surrogate(sequence_logprobs(model, U, adapter="default"), U).mean()


def predict_and_measure(model: PeftModel, optimizer: torch.optim.Optimizer, U: PromptBatch, E: PromptBatch) -> Row:
    """Predict the change that the next step makes on E, take it, and measure."""
    policy_loss(model, U).backward()
    direction = UpdateDirection.from_optimizer_step(model, optimizer)

    s = per_prompt_projection(
        model,
        lambda model: entropy_surrogate(sequence_logprobs(model, E, adapter="default"), E),
        direction,
        example_of_row=E.example_of_row,
    )
    metric = ConditionalVariance()
    metric.update(direction.scale * s)
    delta_1, _, standard_error, _ = metric.compute()
    low, high = skewed_interval(s, direction.scale)

    # L_X is linear in S, with weights that belong to the policy before the step: hold on to them.
    before = sequence_logprobs(model, E, adapter="default").detach().requires_grad_()
    (weights,) = torch.autograd.grad(entropy_surrogate(before, E).mean(), before)
    optimizer.step()
    optimizer.zero_grad()
    after = sequence_logprobs(model, E, adapter="default").detach()
    measured = (weights * (after - before.detach())).sum()
    lr = optimizer.param_groups[0]["lr"]
    return Row(lr, float(delta_1), float(standard_error), low, high, float(measured))


def main() -> None:
    """Train, predict, measure, and show."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--plot", type=Path, default=Path("runs/entropy_change.png"))
    plot = arguments.parse_args().plot
    torch.set_num_threads(1)  # the matrices are too small for more
    torch.manual_seed(0)
    random.seed(0)

    tasks = [(start, step, length) for start in range(16) for step in range(1, 6) for length in (2, 3, 4)]
    random.shuffle(tasks)
    base = base_model()
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).double()
    U, E = sampled(model, tasks[:32]), sampled(model, tasks[32:96])
    refuse_shared_prompts(U, E)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(5):  # so that B is not zero and Adam's moments are not empty
        policy_loss(model, U).backward()
        optimizer.step()
        optimizer.zero_grad()

    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    moments = copy.deepcopy(optimizer.state_dict())
    rows = []
    for lr in LEARNING_RATES:
        optimizer.param_groups[0]["lr"] = lr
        rows.append(predict_and_measure(model, optimizer, U, E))
        model.load_state_dict(adapter, strict=False)
        optimizer.load_state_dict(copy.deepcopy(moments))
    show(rows, len(E.max_lengths))
    draw(rows, plot)


def show(rows: list[Row], prompts: int) -> None:
    """Print the table."""
    table = Table(title=f"Entropy surrogate on {prompts} unseen prompts: predicted and measured change")
    for column in (
        "learning rate",
        "delta_1",
        "standard error",
        "measured",
        "measured / delta_1",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row.lr:.0e}",
            f"{row.delta_1:+.3e}",
            f"{row.standard_error:.1e}",
            f"{row.measured:+.3e}",
            f"{row.measured / row.delta_1:.5f}",
        )
    Console().print(table)


def draw(rows: list[Row], path: Path) -> None:
    """Plot the table, if matplotlib is there."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("No plot: matplotlib is not installed (pip install matplotlib).")
        return
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lr = [row.lr for row in rows]
    figure, (change, ratio) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    change.fill_between(
        lr,
        [row.low / row.lr for row in rows],
        [row.high / row.lr for row in rows],
        alpha=0.2,
        label="95% interval over prompts",
    )
    change.plot(lr, [row.delta_1 / row.lr for row in rows], label="predicted, delta_1")
    change.plot(lr, [row.measured / row.lr for row in rows], "o", color="black", label="measured")
    change.set_ylabel("change / learning rate (nats per token)")
    change.legend()
    error = [abs(row.measured / row.delta_1 - 1) for row in rows]
    ratio.loglog(lr, error, "o", color="black", label="|measured / predicted - 1|")
    ratio.loglog(lr, [error[-1] * x / lr[-1] for x in lr], color="gray", label="proportional to the learning rate")
    ratio.set_ylabel("relative error of the prediction")
    ratio.legend()
    for axes in (change, ratio):
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xlabel("learning rate of the AdamW step")
    figure.suptitle("First-order change of the entropy surrogate, and a real step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Plot: {path}")


if __name__ == "__main__":
    main()
