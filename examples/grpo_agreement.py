"""GRPO: do the responses of a group agree on where to go, and do the groups?

    python examples/grpo_agreement.py

A tiny Llama that counts is trained on by policy gradients, 6 prompts with 8 responses each. All products <g_n, g_m> of
the responses' gradients are taken from the very training step: their mean cosine within a group and across groups,
and how many responses pull against the last step. Responses without an advantage have no gradient, and are left out.
"""

from __future__ import annotations

import random

import torch
from entropy_change import RESPONSES, base_model, policy_loss, sampled
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from lora_probe_callbacks import per_example_scores
from lora_probe_callbacks.estimators import UpdateDirection

STEPS, PROMPTS = 8, 6


def agreement(gram: torch.Tensor) -> tuple[float, float]:
    """Return the mean cosine within and across groups.

    Args:
        gram: [B, B], the responses of a prompt one after another.

    Returns:
        Two means, over pairs of responses whose gradients are not zero.
    """
    length = gram.diagonal().clamp_min(0).sqrt()
    alive = length > 1e-9 * length.max()
    cosine = gram / (length[:, None] * length).clamp_min(1e-300)
    group = torch.arange(len(gram)) // RESPONSES
    same = group[:, None] == group
    pairs = alive[:, None] & alive & ~torch.eye(len(gram), dtype=torch.bool)
    return float(cosine[pairs & same].mean()), float(cosine[pairs & ~same].mean())


def main() -> None:
    """Train, and show."""
    torch.manual_seed(0)
    random.seed(0)
    model = get_peft_model(base_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    table = Table("step", "within a group", "across groups", "responses that pull against the last step")
    before: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        U = sampled(model, [(random.randrange(16), random.randint(1, 5), random.randint(2, 4)) for _ in range(PROMPTS)])
        directions = [UpdateDirection.from_last_step(model, before)] if before else []
        with per_example_scores(model, directions, gram=True) as scores:
            policy_loss(model, U).backward()
        assert scores.checked
        assert scores.gram is not None
        within, across = agreement(scores.gram.double().cpu())
        pulls = f"{float((scores.gain[0] < 0).double().mean()):.0%}" if directions else ""
        table.add_row(str(step), f"{within:+.3f}", f"{across:+.3f}", pulls)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
    Console().print(table)


if __name__ == "__main__":
    main()
