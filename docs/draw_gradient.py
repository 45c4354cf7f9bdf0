"""Draw what the gradient check measures, from two real runs: ``python docs/draw_gradient.py``.

A small Llama with LoRA on all linear layers, and the same with a backward that is wrong by a factor of two in one
projection. Each point is one look at a part of the adapter: the change of the loss over what the gradient says of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_probe_callbacks import LoraProbeMonitor
from lora_probe_callbacks.checks.reachability.wrong_gradient import OFF, SURE
from lora_probe_callbacks.facts import StepResponse

STEPS = 18


def train(*, wrong: bool) -> tuple[StepResponse, ...]:
    """Train for some steps, and return what was measured."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    if wrong:
        part = base.model.layers[2].self_attn.q_proj.lora_B.default
        part.forward = lambda x: nn.functional.linear(x, doubled(part.weight))  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with LoraProbeMonitor(model, optimizer, every_n_steps=1, on_failure="stop", verbose=False) as probe:
        for _ in range(STEPS):
            ids = torch.randint(1, 64, (4, 16))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return probe._session._collector.looks.responses


def doubled(x: Tensor) -> Tensor:
    """The same numbers, and twice the gradient."""
    return 2 * x - x.detach()


def main() -> None:
    """Train both, and draw."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.axhspan(1 - OFF, 1 + OFF, color="0.9", label=f"allowed: {OFF:.0%}")
    for wrong, style, name in ((False, "o", "right"), (True, "x", "wrong in one projection of layer 2")):
        seen = [r for r in train(wrong=wrong) if r.central is not None]
        noise = [SURE * r.noise for r in seen]
        axes.errorbar([r.step for r in seen], [r.central for r in seen], noise, fmt=style, elinewidth=0.8, label=name)
    axes.axvline(1.5, color="0.7", linewidth=0.8)
    axes.set(xlabel="step (0 and 1: the whole adapter, then a part at a time)", ylabel="measured / predicted change")
    axes.set_ylim(0.8, 1.12)
    axes.legend(frameon=False, loc="upper left", ncols=3)
    figure.savefig(Path(__file__).parent / "gradient_check.png", dpi=130)


if __name__ == "__main__":
    main()
