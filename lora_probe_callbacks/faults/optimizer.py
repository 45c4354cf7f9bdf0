"""The optimizer, its schedule, and what precision makes of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lora_probe_callbacks.faults._fault import fault

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@fault("E01", "LP201", "adapter-hub/adapters#260")
def optimizer_before_adapter(base: nn.Module, config: PeftConfig, lr: float = 1e-2) -> tuple[AdamW, PeftModel]:
    """Build the optimizer from the base model, then attach the adapter.

    The optimizer owns frozen weights, whose gradients stay None, and its steps do nothing. LP201
    reports it at step 0.

    Args:
        base: The base model.
        config: The adapter's configuration.
        lr: Learning rate.

    Returns:
        The optimizer and the model to train.
    """
    from peft import get_peft_model

    optimizer = AdamW(base.parameters(), lr=lr)
    return optimizer, get_peft_model(base, config)


@fault("E02", "LP201", "Lightning-Universe/lightning-GPT#17", "Lightning-AI/pytorch-lightning#18279")
def attached_when_training_starts(module: nn.Module, attribute: str, config: PeftConfig) -> None:
    """Attach the adapter of a LightningModule in its ``on_train_start``.

    Lightning calls ``configure_optimizers`` before that hook (and before ``on_fit_start``), so that
    the optimizer holds none of the adapter's tensors. LP201 reports it at step 0.

    Args:
        module: A LightningModule.
        attribute: The attribute that holds the base model.
        config: The adapter's configuration.
    """
    from peft import get_peft_model

    def on_train_start() -> None:
        setattr(module, attribute, get_peft_model(getattr(module, attribute), config))

    module.on_train_start = on_train_start  # type: ignore[assignment]


@fault("E06", "LP208", "huggingface/transformers#33086", "lm-sys/FastChat#2558", "modelscope/ms-swift#6009", by_step=3)
def scheduler_never_stepped(optimizer: Optimizer, warmup: int = 100) -> LambdaLR:
    """Give the optimizer a warm-up that begins at 0, and never step the scheduler.

    LP208 reports it after four steps with a rate of exactly 0: the first ones are what a healthy
    warm-up does.

    Args:
        optimizer: Any optimizer.
        warmup: Steps of the warm-up.

    Returns:
        The scheduler, which is not to be stepped.
    """
    return LambdaLR(optimizer, lambda step: min(1.0, step / warmup))


@fault("E11", "LP001", "unslothai/unsloth#5747", "unslothai/notebooks#270")
def labels_all_masked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Mask every label, as a wrong chat template or prompt mask does.

    The gradients are exactly zero, and AdamW's weight decay moves the parameters all the same. LP001 warns of it
    at once and fails after four steps; where labels cannot be seen, it is LP402 or LP303 after four steps.

    Args:
        batch: Arguments of the model, with ``labels`` or with ``input_ids``.

    Returns:
        A copy of the batch in which every label is -100.
    """
    labels: Tensor = batch["labels"] if "labels" in batch else batch["input_ids"]
    return {**batch, "labels": torch.full_like(labels, -100)}


@fault("H02", "LP403", "keras-team/keras-hub#2629", "verl-project/verl-omni#73", "huggingface/peft#1634", by_step=3)
def half_precision_adapter(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Cast the model with its adapter to 16 bits, without float32 master weights.

    ``lora_B`` starts at zero and moves; ``lora_A`` has values whose last digit is larger than the
    update at a learning rate of 1e-5 or so, and stands still. LP403 reports it after four steps.

    Args:
        model: A model with an adapter.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """
    model.to(dtype)


@fault("H04", "LP406", "NVIDIA/apex#715", "zai-org/CogVideo#233", "radixark/miles#2198", by_step=3)
def overflowing(loss: Tensor) -> Tensor:
    """Let the gradients overflow in every step while the loss stays finite.

    A gradient scaler skips such steps without a message. LP406 reports four of them in a row.
    Without a scaler the update is made of inf and nan: LP501.

    Args:
        loss: The loss.

    Returns:
        The same loss, whose gradient is infinite.
    """
    loss = loss * 1.0
    loss.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[no-untyped-call]
    return loss


@fault("H06", "LP401", "deepspeedai/DeepSpeed#7632", "huggingface/peft#1402", by_step=3)
def steps_swallowed(optimizer: Optimizer) -> None:
    """Let ``step()`` return without an update, as an optimizer does that believes in an overflow.

    A stand-in: the reports are of DeepSpeed's fused optimizers. LP401 reports it with the decision
    after the fourth step without a change.

    Args:
        optimizer: Any torch optimizer; its closure and its hooks still run.
    """

    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()

    _exchange_step(optimizer, step)


@fault("P03", "LP406", "eriklindernoren/PyTorch-YOLOv3#325", "huggingface/transformers#2995", by_step=3)
def stops_stepping(optimizer: Optimizer) -> None:
    """Let the loop call ``step()`` no more, while it goes on to make gradients and to throw them away.

    What a condition in front of ``optimizer.step()`` does that is not met any more, or something that stands in for the
    method. At the default cadence no step is looked at again after this, for steps are counted by ``step()``: the
    backward passes tell that the loop goes on. LP406 warns after four steps that were not made and fails after 16;
    where the gradients are kept LP401 does, after 32 backward passes and after 128.

    Args:
        optimizer: Any torch optimizer; what it is called with still runs, its hooks do not.
    """
    optimizer.step = lambda closure=None: None if closure is None else closure()  # type: ignore[assignment, method-assign]


def _exchange_step(optimizer: Optimizer, step: Callable[..., Any]) -> None:
    hooked = Optimizer.profile_hook_step(step)
    optimizer.__class__ = type(type(optimizer).__name__, (type(optimizer),), {"step": hooked})


@fault("E07", "LP210", "huggingface/peft#3499", "huggingface/peft#3503")
def embedding_missing_from_loraplus(model: nn.Module, lr: float = 1e-4, ratio: float = 16.0) -> AdamW:
    """Build LoRA+'s groups with a rule that never meets an embedding.

    The group of the embeddings stays empty, and their B gets the rate of A. LP210 warns of it at step 0.

    Args:
        model: A model with adapters on an embedding and on linear layers.
        lr: Learning rate of A.
        ratio: Learning rate of B over that of A.

    Returns:
        The optimizer.
    """
    tensors = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    faster = [p for n, p in tensors if "lora_B" in n]
    rest = [p for n, p in tensors if "lora_B" not in n]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": faster, "lr": lr * ratio}, {"params": []}]
    return AdamW(groups, lr=lr)


@fault("E08", "LP407", "radixark/miles#2572")
def master_copies_from_before(optimizer: Optimizer) -> None:
    """Give an optimizer master copies of the present values: it steps those, and writes them back.

    What mixed-precision optimizers of large frameworks do. Restore the adapter after this, and the first
    step erases it. LP407 reports that step, with the decision that follows it.

    Args:
        optimizer: An optimizer that owns the adapter.
    """
    tensors = [t for group in optimizer.param_groups for t in group["params"]]
    masters = {t: t.detach().clone() for t in tensors}
    update: Any = getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)  # without torch's own hooks

    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for tensor, master in masters.items():
            tensor.data.copy_(master)
        update(self)
        for tensor, master in masters.items():
            master.copy_(tensor.detach())
        return loss

    _exchange_step(optimizer, step)


@fault("E10", "LP501", "bitsandbytes-foundation/bitsandbytes#152", "kohya-ss/sd-scripts#523", by_step=1)
def second_moment_not_representable(optimizer: Optimizer) -> None:
    """Store Adam's second moment with a map that sends small values below zero, as a bad table does in 8 bits.

    The root of it is not a number, and so is the next update. A stand-in: current bitsandbytes is sound.
    LP501 reports it at the second step.

    Args:
        optimizer: An optimizer of Adam's kind.
    """

    def store(optimizer: Optimizer, args: object, kwargs: object) -> None:
        for state in optimizer.state.values():
            state["exp_avg_sq"].sub_(state["exp_avg_sq"].abs().max() / 16)

    optimizer.register_step_post_hook(store)


@fault("H03", "LP408", "AndreasBergmeister/ram#6", by_step=3)
@torch.no_grad()
def averaged_in_half_precision(model: nn.Module, source: str, lagged: str, decay: float = 0.9999) -> None:
    """Move a lagged adapter that is stored in 16 bits one step towards another one.

    (1 - decay) times the difference is less than half a last digit: nothing changes, ever. Call it after every
    step. LP408 reports it after three updates, given ``lagged_adapters=(lagged,)``.

    Args:
        model: A model with both adapters, ``lagged`` in float16 or bfloat16.
        source: The adapter that trains.
        lagged: The adapter that should follow it.
        decay: Of the average.
    """
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if f".{lagged}." in name:
            tensor.mul_(decay).add_(
                tensors[name.replace(f".{lagged}.", f".{source}.")].to(tensor.dtype), alpha=1 - decay
            )
