"""The adapter is not active, or its reference is not what it should be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from lora_probe_callbacks.faults._fault import fault

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@fault("A01", "LP101", "huggingface/peft#1444", "unslothai/unsloth#1592")
def added_but_not_activated(model: PeftModel, name: str, config: PeftConfig) -> None:
    """Add an adapter and forget ``set_adapter``: the adapter that was there goes on learning in its place.

    ``PeftModel.add_adapter`` and ``load_adapter`` leave the active adapter as it is. LP101 reports
    it at step 0 when the run says ``adapter=name``; without that word nobody can know which of the
    two was meant, and LP108 warns of an idle adapter instead.

    Args:
        model: A model with an adapter.
        name: Name of the adapter that should have trained.
        config: Its configuration.
    """
    model.add_adapter(name, config)


@fault("A05", "LP207", "huggingface/peft#3447", "huggingface/peft#3453")
def reference_left_trainable(model: PeftModel, reference: str) -> None:
    """Activate a frozen reference, then score the base model: leaving that context unfreezes the reference.

    On exit ``disable_adapter()`` calls ``set_adapter`` with the active adapters and with its default,
    which makes them trainable (peft 0.21). The reference then learns and the policy does not. LP207
    reports it at step 0, given ``reference_adapters=(reference,)``.

    Args:
        model: A model with the adapter to train and a reference.
        reference: Name of the reference.
    """
    from peft.functional import set_requires_grad

    model.set_adapter(reference)
    set_requires_grad(model, reference, requires_grad=False)  # peft 0.19 has inference_mode=True for this
    with model.disable_adapter():
        pass


@fault("A06", "LP102", "huggingface/peft#912", "huggingface/peft#493", "unslothai/unsloth#3068")
def left_disabled(model: PeftModel) -> None:
    """Switch the adapters off and do not switch them on again.

    PEFT's ``disable_adapter_layers()`` and transformers' ``disable_adapters()`` are no context
    managers. LP102 reports it in the step in which the first forward runs without adapters.

    Args:
        model: A model with adapters.
    """
    model.base_model.disable_adapter_layers()  # type: ignore[operator]


@fault("A13", "LP404", "NVIDIA-NeMo/Speech#5086")
def idle_adapter_stepped(optimizer: Optimizer) -> None:
    """Leave gradients of zero on everything that the optimizer owns and nobody trains at present.

    What ``zero_grad(set_to_none=False)`` leaves of an adapter that was trained before, when one
    optimizer holds several. AdamW passes over a gradient of None but not over zeros: momentum and
    weight decay move an adapter that no forward uses. LP404 reports the first step that does, with the
    decision that follows it. Clear gradients with ``set_to_none=False`` in the loop as well, and call
    this after training has begun: Lightning clears all gradients once before it.

    Args:
        optimizer: An optimizer that owns tensors of an adapter that is not active.
    """
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)


@fault("P08", "LP111", "Lightning-AI/pytorch-lightning#20105")
def left_in_eval_mode(model: nn.Module) -> None:
    """Train in eval mode, as an evaluation without a ``train()`` after it leaves a model, or ``from_pretrained``.

    Dropout does nothing and gradient checkpointing does not checkpoint; the loss is that of a healthy run. LP111 warns
    of the first step that trains so, if lora_dropout or checkpointing is configured. The Trainer calls ``train()`` in
    every step, so it does not happen there.

    Args:
        model: A model with ``lora_dropout``, or with gradient checkpointing.
    """
    model.eval()


@fault("P08", "LP110", "huggingface/peft#2609")
def invocation_tokens_changed(ids: torch.Tensor, tokens: Sequence[int], other: int) -> torch.Tensor:
    """Write a batch without the invocation tokens of an activated LoRA, as another chat template does.

    PEFT looks for them in every row, adds none, and leaves the adapter off where there are none. LP110 warns of the
    first step with such rows, and fails after four in which no row has them.

    Args:
        ids: Token ids, [batch, length].
        tokens: ``alora_invocation_tokens``.
        other: The token in their place.

    Returns:
        The changed batch.
    """
    return ids.masked_fill(torch.isin(ids, torch.tensor(tokens, device=ids.device)), other)


@fault("origin", "LP105")
def activated_after_forward(model: PeftModel, name: str, before: str, **batch: Any) -> Any:
    """Call the model while another adapter is active, and activate the right one afterwards.

    The bug that this package comes from: whoever looks at the model between two steps finds the
    right adapter active. Use it in place of ``model(**batch)``. LP105 reports it at step 0.

    Args:
        model: A model with both adapters.
        name: The adapter that should train.
        before: The adapter that is active in the forward.
        **batch: Arguments of the model.

    Returns:
        What the model returns.
    """
    model.set_adapter(before)
    output = model(**batch)
    model.set_adapter(name)
    return output


@fault("A04", "LP101", "huggingface/peft#3580", "huggingface/peft#3487")
def added_after_a_frozen_one(model: PeftModel, name: str, config: PeftConfig) -> None:
    """Load one adapter for inference, then add the one to train: both are frozen, and the first is active.

    peft 0.20 applied the new adapter's mode to the old one instead, which then trained. LP101 reports it at
    step 0 when the run says ``adapter=name``; without that word LP203 reports that what is active is frozen.

    Args:
        model: A model whose adapter was loaded with ``is_trainable=False``.
        name: Name of the adapter that should have trained.
        config: Its configuration.
    """
    model.add_adapter(name, config)


@fault("A08", "LP109", "NVIDIA-NeMo/Megatron-Bridge#5945", by_step=3)
@contextmanager
def disabled_and_always_enabled(model: PeftModel) -> Iterator[None]:
    """Disable the adapters in a block, and enable them at its end whatever they were before.

    Entered inside another such block (a helper of the reference's own), it leaves the rest of that block with the
    adapters on. PEFT's own context manager puts back what was. LP109 reports it after four steps, given
    ``reference="disabled"``.

    Args:
        model: A model with adapters.

    Yields:
        Nothing.
    """
    model.base_model.disable_adapter_layers()  # type: ignore[operator]
    try:
        yield
    finally:
        model.base_model.enable_adapter_layers()  # type: ignore[operator]


@fault("A09", "LP504", "huggingface/trl#1193", "huggingface/trl#4723", "huggingface/trl#6591")
def trained_before(model: nn.Module, std: float = 0.1) -> None:
    """Make the adapter one that was trained before, as by an SFT phase.

    With ``reference="disabled"`` the loss then compares with the base model, and not with where the policy starts:
    rewards and KL are not zero before the first update. LP504 warns of it at step 0, since a second round against the
    base model looks the same.

    Args:
        model: A model with a fresh adapter.
        std: Spread of the values of B.
    """
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.normal_(std=std)


@fault("A10", "LP109", "huggingface/trl#1311", "huggingface/trl#1843", "huggingface/trl#4023", by_step=3)
def reference_not_disabled(model: nn.Module, **batch: Any) -> Any:
    """Score the reference without gradients, and forget ``disable_adapter()``.

    Policy and reference are the same weights: DPO's loss stands at 0.6931 while gradients flow and parameters move.
    Use it in place of the reference forward. LP109 reports it after four steps, given ``reference="disabled"``.

    Args:
        model: The policy.
        **batch: Arguments of the model.

    Returns:
        What the model returns.
    """
    with torch.no_grad():
        return model(**batch)


@fault("A11", "LP207", "huggingface/peft#2759", "huggingface/peft#2928")
def head_of_reference_left_trainable(model: PeftModel, reference: str) -> None:
    """Leave the ``modules_to_save`` copy of a frozen adapter trainable, as peft up to 0.17 did.

    LP207 reports it at step 0, given ``reference_adapters=(reference,)``.

    Args:
        model: A model with a reference that has a ``modules_to_save`` copy.
        reference: Name of the reference.
    """
    for name, tensor in model.named_parameters():
        if f"modules_to_save.{reference}." in name:
            tensor.requires_grad_(True)
