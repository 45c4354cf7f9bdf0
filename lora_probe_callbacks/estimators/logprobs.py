"""Log-probs of responses under one adapter, teacher-forced, through the PEFT module itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_probe_callbacks.estimators._activation import activated, is_active, peft_module
from lora_probe_callbacks.estimators.batches import PromptBatch

# Elements of the logits that are in float32 at one time: 64 MiB, 110 rows of a vocabulary of 152 k.
_CHUNK = 2**24


def sequence_logprobs(
    model: nn.Module, batch: PromptBatch, *, adapter: str | Sequence[str], temperature: float = 1.0
) -> Tensor:
    """`S[b, g] = sum_t log pi(response token t | prompt, response tokens before t)`, in nats.

    With `pi = softmax(logits / temperature)`, over the tokens of `response_mask`, in float32 (float64
    where the logits are). One forward of the `B * G` rows through the PEFT module inside `model`,
    whichever wrappers are around it; position ids count from each row's first real token.

    The adapter is activated (and enabled) before the forward; afterwards active adapters and the disabled
    flags are put back as they were, after an exception too. `requires_grad` is left alone throughout,
    although PEFT's `set_adapter` changes it: a frozen reference adapter stays frozen and gets no
    gradient. Train or eval mode, and so dropout, is the caller's; so is autocast. Gradients are
    recorded under `torch.no_grad` as well.

    Args:
        model: The model that is trained: a `PeftModel`, a transformers model with PEFT adapters, or any
            module that holds one (DDP, `torch.compile`, a LightningModule).
        batch: The rows, on the model's device.
        adapter: Name of the adapter, or names where several are active together.
        temperature: The sampling temperature that `S` is to belong to.

    Returns:
        `S`, `[B, G]`, twice differentiable.

    Raises:
        RuntimeError: Under `torch.inference_mode`, or if adapters are merged. Under transformers' gradient
            checkpointing the backward runs the forward again: raised from there if `S` had to switch
            adapters and the adapter is not active any more.
        ValueError: If there is no such adapter, no PEFT module or more than one, the temperature is not
            positive, or the model returns no logits for these rows.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "got torch.inference_mode(), expected a context in which gradients can be recorded: inference "
            "mode cannot be undone from inside; leave it for sequence_logprobs (torch.no_grad is fine)"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"got temperature={temperature}, expected a positive number; 1.0 for plain log-probs")
    policy = peft_module(model)
    adapters = [adapter] if isinstance(adapter, str) else [*adapter]
    rows, T = batch.sequences.flatten(0, 1), batch.sequences.shape[2]
    with torch.enable_grad(), activated(policy, adapters) as switched:
        logits = _response_logits(policy, batch)
        # Logits at t predict token t + 1. The last ones predict nothing, but cutting them off would copy all.
        kept = slice(T - logits.shape[1], None)
        targets = rows.roll(-1, 1)[:, kept]
        counted = batch.response_mask.flatten(0, 1).roll(-1, 1)[:, kept]
        log_pi = _selected_log_softmax(logits, targets, temperature)
        S = log_pi.masked_fill(~counted, 0.0).sum(-1).view(batch.sequences.shape[:2])
        if switched and S.requires_grad and _runs_twice(policy):
            S.register_hook(lambda _: _refuse_other_adapter(policy, adapters))  # type: ignore[no-untyped-call]
    return S


def _response_logits(policy: nn.Module, batch: PromptBatch) -> Tensor:
    # Logits, `[B * G, T or fewer, V]`: without those of the prompt where the model can leave them out.
    rows, mask = batch.sequences.flatten(0, 1), batch.attention_mask.flatten(0, 1)
    needed = rows.shape[1] - batch.prompt_boundary + 1  # the last prompt token predicts the first
    inputs = {
        "attention_mask": mask.long(),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "logits_to_keep": needed,
        "use_cache": False,
    }
    base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    accepted = inspect.signature(base.forward).parameters
    output = policy(rows, **{name: value for name, value in inputs.items() if name in accepted})
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    N, T = rows.shape
    if not isinstance(logits, Tensor) or (logits.ndim, *logits.shape[:2]) not in ((3, N, T), (3, N, needed)):
        shape = list(logits.shape) if isinstance(logits, Tensor) else None
        raise ValueError(
            f"got {type(output).__name__} with logits of shape {shape}, expected [{N}, {T} or {needed}, "
            f"vocabulary] for {N} rows of {T} tokens: pass a causal language model"
        )
    return logits


class _SelectedLogSoftmax(torch.autograd.Function):
    # Keeps the logits, in their own dtype, and nothing else of their size: forward and backward go over
    # them in chunks. torch.log_softmax in float32 would keep a second, float32, copy.

    @staticmethod
    def forward(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        pieces = [
            torch.log_softmax(z, -1).gather(-1, target[:, None])[:, 0]
            for z, (target,) in _chunks(logits, temperature, targets)
        ]
        return torch.cat(pieces).view_as(targets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, targets, ctx.temperature = inputs
        ctx.save_for_backward(logits, targets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # d/dz = grad / temperature * (onehot(target) - softmax(z / temperature)). All operations are
        # differentiable: under create_graph autograd records them for the second derivative.
        logits, targets = ctx.saved_tensors
        d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        flat, start = d_logits.view(-1, logits.shape[-1]), 0
        for z, (target, grad) in _chunks(logits, ctx.temperature, targets, grads[0]):
            scaled = grad[:, None] / ctx.temperature
            d_z = (-scaled * torch.softmax(z, -1)).scatter_add(-1, target[:, None], scaled)
            flat[start : start + len(z)] = d_z.to(logits.dtype)
            start += len(z)
        return d_logits, None, None


def _selected_log_softmax(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    # log softmax(logits / temperature)[target], `[N, T, V], [N, T] -> [N, T]`, in float32 or float64.
    selected: Tensor = _SelectedLogSoftmax.apply(logits, targets, temperature)  # type: ignore[no-untyped-call]
    return selected


def _chunks(logits: Tensor, temperature: float, *others: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    # Rows of logits / temperature in float32 or float64, `[chunk, V]`, with those of `[N, T]` tensors.
    rows = max(1, _CHUNK // logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    parts = [torch.split(other.reshape(-1), rows) for other in others]
    for z, *part in zip(torch.split(logits.flatten(0, 1), rows), *parts, strict=True):
        yield z.to(dtype) / temperature, tuple(part)


def _runs_twice(policy: nn.Module) -> bool:
    # transformers' own switch; a checkpoint that a user wrote by hand is not seen here.
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in policy.modules())


def _refuse_other_adapter(policy: nn.Module, adapters: list[str]) -> None:
    if not is_active(policy, adapters):
        raise RuntimeError(
            f"got a backward of S while {adapters}, which made it, is not active any more: gradient "
            "checkpointing runs the forward again now, with the wrong adapter; activate it "
            "(model.set_adapter) for forward and backward, or switch gradient checkpointing off"
        )
