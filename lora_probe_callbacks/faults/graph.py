"""The gradient is cut on the way, or the forward passes the adapter by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_probe_callbacks.faults._fault import fault

if TYPE_CHECKING:
    from peft import PeftModel


@fault(
    "D01",
    "LP302",
    "locuslab/open-unlearning#178",
    "huggingface/transformers#25841",
    "huggingface/trl#2486",
)
def checkpointed_without_input_gradients(model: PeftModel) -> None:
    """Switch on reentrant checkpointing and take the input-gradient hook away.

    A reentrant checkpoint drops the graph if none of its inputs requires gradients. An adapter
    outside the blocks (``lm_head``) is enough for backward() to succeed. LP302 reports the others
    at step 0.

    Args:
        model: A PeftModel around a transformers model, with an adapter outside the checkpointed blocks.
    """
    base: Any = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    base.disable_input_require_grads()


@fault("D04", "LP307", "Comfy-Org/ComfyUI#15846", by_step=1)
def recompute_with_other_dropout(model: PeftModel) -> None:
    """Checkpoint without keeping the random state: the backward goes through other dropout masks than the forward.

    The loss is that of a healthy run, number for number; the gradient is that of another function. The adapter
    needs dropout. LP307 reports it at the second step, when two of them disagree with a finite difference.

    Args:
        model: A PeftModel around a transformers model, with ``lora_dropout``.
    """
    base: Any = model.get_base_model()
    base.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
    )


@fault(
    "D02",
    "LP302",
    "2U1/Qwen-VL-Series-Finetune#193",
    "huggingface/transformers#42558",
    "modelscope/ms-swift#10214",
)
def tower_checkpointed_reentrant(tower: nn.Module) -> None:
    """Checkpoint a tower that is fed with data: pixels and waveforms carry no gradient.

    The input-gradient hook sits on the text embeddings and does not help here. The language model
    learns, the tower's adapters get None. LP302 reports them at step 0.

    Args:
        tower: A part of the model whose inputs are data.
    """
    forward = tower.forward
    # A partial, not a closure over the module: the model must stay what deepcopy and pickle know.
    tower.forward = partial(checkpoint, forward, use_reentrant=True)


@fault("G01", "LP104", "huggingface/trl#4612", "huggingface/trl#5977", "huggingface/trl#6159", by_step=1)
def head_bypassed(model: PeftModel, input_ids: Tensor) -> Tensor:
    """Compute the loss from the hidden states and ``lm_head.weight``, as fused losses do.

    On an adapted ``lm_head`` that attribute is the frozen base weight. All other adapters learn and
    the loss falls. Use it in place of the model's own loss. LP104 suspects the layer at step 0 and
    sees at step 1 that its weight is read.

    Args:
        model: A PeftModel around a causal language model, with an adapter on ``lm_head``.
        input_ids: [batch, length]

    Returns:
        The mean loss of the next token.
    """
    base: Any = model.get_base_model()
    hidden = base.get_decoder()(input_ids=input_ids)[0]  # [batch, length, width]
    logits = hidden @ base.get_output_embeddings().weight.T
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())


@fault("G05", "LP303", "modelscope/ms-swift#4547", by_step=3)
def no_advantage(log_probs: Tensor) -> Tensor:
    """Make a policy-gradient loss from advantages that are zero, as equal rewards in a group give.

    Healthy once in a while. When every batch since the start is like that, LP303 reports it after
    four steps.

    Args:
        log_probs: Log-probabilities of the sampled tokens, of any shape.

    Returns:
        The loss, exactly 0 with gradients exactly 0.
    """
    return -(torch.zeros_like(log_probs) * log_probs).mean()


@fault("G07", "LP405", "X-GenGroup/Flow-Factory#186", by_step=1)
@contextmanager
def outer_autocast(device_type: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Enter autocast once around the whole loop.

    Its cache of cast weights is emptied when the block ends, not when an optimizer changes a weight:
    the forward goes on with the weights of the first step. LP405 reports it at step 1, when there is
    a first update that the forward could have seen.

    Args:
        device_type: Where the model is.
        dtype: What to cast to.

    Yields:
        Nothing.
    """
    with torch.autocast(device_type, dtype):
        yield


@fault("G08", "LP209", "huggingface/trl#6277", "huggingface/peft#940")
def base_model_called(model: PeftModel, **batch: Any) -> Any:
    """Call the base model inside a prompt-tuning model.

    The virtual tokens live in ``PeftModel.forward``, so the base model never sees them. (LoRA is
    injected into the base model and works either way.) Use it in place of ``model(**batch)``. LP209
    reports it at step 0.

    Args:
        model: A PeftModel with prompt tuning, prefix tuning or p-tuning.
        **batch: Arguments of the model.

    Returns:
        What the base model returns.
    """
    return model.get_base_model()(**batch)


@fault("G03", "LP104", "huggingface/peft#2274", "huggingface/peft#1612", "state-spaces/mamba#279", by_step=1)
def projection_inside_a_kernel(parent: nn.Module, inner: str, outer: str) -> None:
    """Let a block compute ``outer(inner(x))`` with the weight of ``outer``, without calling it, as fused kernels do.

    PEFT refuses Mamba's ``out_proj``; models of one's own it does not know. LP104 suspects the layer at
    step 0 and sees at step 1 that its weight is read.

    Args:
        parent: The block.
        inner: Name of the linear layer that it calls.
        outer: Name of the adapted linear layer that it does not call.
    """
    # A partial, not a closure over the module: the model must stay what deepcopy and pickle know.
    parent.forward = partial(_fused, parent, inner, outer)


def _fused(parent: nn.Module, inner: str, outer: str, x: Tensor) -> Tensor:
    skipped: Any = getattr(parent, outer)
    hidden: Tensor = getattr(parent, inner)(x)
    return F.linear(hidden, skipped.weight, skipped.bias)


@fault("G06", "LP301", "huggingface/peft#291", "pytorch/pytorch#105211", "Lightning-AI/pytorch-lightning#19810")
def casts_cached_without_gradients(model: nn.Module) -> None:
    """Let the adapter's layers compute with copies of their weights that carry no gradient.

    What autocast's cache held after a forward without gradients in the same block, on older torch; 2.13 is sound. LP301
    reports it at step 0.

    Args:
        model: A model with an adapter.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("lora_A." in name or "lora_B." in name):
            module.forward = partial(_with_cached_weight, module)  # type: ignore[method-assign]


def _with_cached_weight(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.detach())
