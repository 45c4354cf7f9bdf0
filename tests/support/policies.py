"""A policy that trains beside a frozen reference on one base, and prompts for an estimator."""

from __future__ import annotations

from typing import Any

import torch
from support.training import batches, config, lora, trained
from torch import Tensor, nn

E = batches(3, size=6)[2]  # rows that the first two training batches do not have
INTENT: dict[str, Any] = {"adapter": "policy", "reference_adapters": ("default",)}


def policy() -> Any:
    """The adapter "policy" is active and trains; "default" is a frozen reference."""
    model = lora()
    torch.manual_seed(0)
    model.add_adapter("policy", config())
    trained(model)
    model.base_model.set_adapter("default", inference_mode=True)
    model.set_adapter("policy")
    return model


def log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    """S: the log-prob of each row, [B]."""
    log_p = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    return log_p.gather(-1, ids[:, 1:, None])[..., 0].sum(1)
