"""Log-probs of given tokens under a causal model in this process."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn

from lora_probe_callbacks.serving.errors import CannotCompareError

__all__ = ["Rows", "as_rows", "in_eval_mode", "log_softmax_of", "score"]

Rows = list[list[int]]  # token ids of each sequence
Chosen = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_LOGITS = 2**24  # elements that are in float32 at a time: 64 MiB
_AT_ONCE = 4096  # tokens of a forward


def as_rows(tokens: object) -> Rows:
    """Token ids as lists, one a sequence.

    Args:
        tokens: A tensor ``[sequences, tokens]``, or a list of lists or tensors.

    Returns:
        The same as plain lists.

    Raises:
        CannotCompareError: If it is none of these, or a sequence has less than two tokens.
    """
    plain = tokens.tolist() if isinstance(tokens, torch.Tensor | np.ndarray) else tokens
    if not isinstance(plain, list | tuple) or not plain:
        raise CannotCompareError(f"got tokens of type {type(tokens).__name__}, expected lists of token ids")
    rows = [row.tolist() if isinstance(row, torch.Tensor | np.ndarray) else row for row in plain]
    for row in rows:
        if not isinstance(row, list | tuple) or not all(type(token) is int and token >= 0 for token in row):
            raise CannotCompareError("got tokens that are not lists of token ids, expected [[1, 5, 7], [1, 3]]")
        if len(row) < 2:
            raise CannotCompareError(
                f"got a sequence of {len(row)} token(s), expected at least 2: the first has no log-prob"
            )
    return [list(row) for row in rows]


def in_eval_mode(model: nn.Module) -> nn.Module:
    """Switch dropout off, and return the model."""
    # A 4-bit layer has none, and stays in training mode: in the other its first forward packs the weight for good, on
    # CPUs with AVX512-BF16 (bitsandbytes 0.50).
    for module in model.modules():
        module.training = "support_avx512bf16_for_cpu" in vars(module)
    return model


def log_softmax_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probs of the targets, ``[tokens, vocabulary], [tokens] -> [tokens]``."""
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@torch.no_grad()
def score(model: nn.Module, rows: Rows, chosen: Chosen = log_softmax_of) -> list[NDArray[np.float64]]:
    """Log-probs of every token but the first of each sequence, given those before it.

    Args:
        model: A causal language model; in which mode is the caller's business.
        rows: Token ids.
        chosen: From logits in float32, ``[tokens, vocabulary]``, and targets to what is wanted of each token.

    Returns:
        One array a sequence, of its length less one, in nats.

    Raises:
        CannotCompareError: If the model returns no logits for these tokens, or ones that are not finite.
    """
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    found: list[NDArray[np.float64]] = [np.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for group in _groups(order, rows):
        longest = max(len(rows[i]) for i in group)
        ids = torch.zeros(len(group), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, i in enumerate(group):
            ids[line, : len(rows[i])] = torch.tensor(rows[i])
            mask[line, : len(rows[i])] = 1
        logits = _logits(model, ids.to(device), mask.to(device))
        for line, i in enumerate(group):
            length = len(rows[i])
            found[i] = _of_row(logits[line, : length - 1], ids[line, 1:length].to(logits.device), chosen)
    if not all(np.isfinite(row).all() for row in found):
        raise CannotCompareError("got log-probs that are not finite, expected finite ones: the model returns NaN")
    return found


def _groups(order: Sequence[int], rows: Rows) -> list[list[int]]:
    """Sequences of like lengths, so many that a forward has not too many tokens."""
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * len(rows[i]) <= _AT_ONCE:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    accepted = inspect.signature(base.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    inputs = {"attention_mask": mask, "use_cache": False}
    embedding = getattr(base, "get_input_embeddings", lambda: None)()
    if isinstance(embedding, nn.Module) and int(ids.max()) >= (size := getattr(embedding, "num_embeddings", math.inf)):
        raise CannotCompareError(
            f"got the token id {int(ids.max())}, expected ids below {size}: these are tokens of another tokenizer"
        )
    output = model(ids, **{k: v for k, v in inputs.items() if k in accepted or open_ended})
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[:2] != ids.shape:
        shape = list(logits.shape) if isinstance(logits, torch.Tensor) else None
        raise CannotCompareError(
            f"got {type(output).__name__} with logits of shape {shape}, expected [{ids.shape[0]}, {ids.shape[1]}, "
            "vocabulary]: pass a causal language model"
        )
    return logits


def _of_row(logits: torch.Tensor, targets: torch.Tensor, chosen: Chosen) -> NDArray[np.float64]:
    rows = max(1, _LOGITS // logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    pairs = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    parts = [chosen(z.to(dtype), t) for z, t in pairs]
    return torch.cat(parts).double().cpu().numpy()
