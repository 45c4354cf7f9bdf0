"""Real faults of LoRA fine-tuning, to inject into a run of your own.

Each function does to your model, optimizer, batch or loss what a public bug report describes, and
nothing else: nothing is printed, and in most of these runs the loss looks right. Put one into a
script that works, start it with the probe, and see which check stops it and when::

    model = get_peft_model(base, config)
    model.enable_input_require_grads()      # what gradient checkpointing does to every text model
    faults.left_merged(model)
    trainer.fit(...)                        # LP103 before the first update

Without ``enable_input_require_grads()`` the faults that cut off the whole adapter are loud: the
backward raises "element 0 of tensors does not require grad", and the probe adds the reason to that
exception as a note.

:data:`FAULTS` lists them all with the code of the check that finds each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = ["FAULTS", "Fault"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, for a program that goes through all of them.

    Attributes:
        name: Name of the function in this module.
        entry: The public fault that it reproduces, as the test suite counts them.
        code: Code of the check that finds it.
        by_step: The last step, counted from the one in which it takes effect, at which it is found;
            above 0 where one step proves nothing (a gradient of zero, a part without a gradient).
        threads: Public reports, as ``owner/repository#number``.
        inject: The function.
    """

    name: str
    entry: str
    code: str
    by_step: int
    threads: tuple[str, ...]
    inject: Callable[..., Any]


FAULTS: dict[str, Fault] = {}
"""Name to fault, in the order of the entries."""


def _fault(entry: str, code: str, *threads: str, by_step: int = 0) -> Callable[[Callable[P, R]], Callable[P, R]]:
    def enter(inject: Callable[P, R]) -> Callable[P, R]:
        name = getattr(inject, "__name__", entry)
        FAULTS[name] = Fault(name, entry, code, by_step, threads, inject)
        __all__.append(name)
        return inject

    return enter


# --- not active ---------------------------------------------------------------------------------


@_fault("A01", "LP101", "huggingface/peft#1444", "unslothai/unsloth#1592")
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


@_fault("A05", "LP207", "huggingface/peft#3447", "huggingface/peft#3453")
def reference_left_trainable(model: PeftModel, reference: str) -> None:
    """Activate a frozen reference, then score the base model: leaving that context unfreezes the reference.

    On exit ``disable_adapter()`` calls ``set_adapter`` with the active adapters and with its default,
    which makes them trainable (peft 0.21). The reference then learns and the policy does not. LP207
    reports it at step 0, given ``reference_adapters=(reference,)``.

    Args:
        model: A model with the adapter to train and a reference.
        reference: Name of the reference.
    """
    model.set_adapter(reference, inference_mode=True)
    with model.disable_adapter():
        pass


@_fault("A06", "LP102", "huggingface/peft#912", "huggingface/peft#493", "unslothai/unsloth#3068")
def left_disabled(model: PeftModel) -> None:
    """Switch the adapters off and do not switch them on again.

    PEFT's ``disable_adapter_layers()`` and transformers' ``disable_adapters()`` are no context
    managers. LP102 reports it in the step in which the first forward runs without adapters.

    Args:
        model: A model with adapters.
    """
    model.base_model.disable_adapter_layers()  # type: ignore[operator]


@_fault("A13", "LP404", "NVIDIA-NeMo/Speech#5086")
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


@_fault("origin", "LP105")
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


# --- merged, unloaded, wrapped again ------------------------------------------------------------


@_fault("B01", "LP103", "huggingface/trl#2873", "huggingface/trl#6688", "huggingface/peft#2437")
def left_merged(model: PeftModel) -> None:
    """Merge the adapter, as for a generation or a weight sync, and do not unmerge it.

    A merged layer calls its base layer alone. The merged base weight contains the adapter, so the
    loss is exactly what it was, and ``requires_grad`` is still True. LP103 reports it in the step in
    which the first forward runs merged.

    Args:
        model: A model with an adapter.
    """
    model.merge_adapter()


@_fault("B02", "LP103", "huggingface/trl#4713", "huggingface/trl#956")
def merged_and_unloaded(model: PeftModel) -> nn.Module:
    """Merge and unload before training: no adapter tensor is left, in either object.

    ``model`` is still a PeftModel by type; LP103 reports at step 0 that it holds nothing. Training
    the returned base model is refused at the start with a ValueError: there is no adapter to watch.

    Args:
        model: A model with an adapter.

    Returns:
        The base model with the adapter in its weights.
    """
    unloaded: nn.Module = model.merge_and_unload()
    return unloaded


@_fault("B03", "LP202", "huggingface/lerobot#3459", "huggingface/peft#793")
def wrapped_again(model: PeftModel, config: PeftConfig) -> PeftModel:
    """Wrap the base model of a model whose optimizer exists: new tensors stand under the same names.

    Call it after the optimizer was built from ``model``, and train what it returns. LP202 reports at
    step 0 that the optimizer steps orphans.

    Args:
        model: A model with an adapter, of which an optimizer holds the tensors.
        config: Configuration with the same targets.

    Returns:
        A second PeftModel around the same base model.
    """
    from peft import get_peft_model

    return get_peft_model(model.get_base_model(), config)


@_fault("B04", "LP107", "huggingface/lerobot#3459")
def wrapped_in_a_second_peft_model(model: PeftModel, config: PeftConfig) -> PeftModel:
    """Wrap a model that was already wrapped: the adapter that was loaded is initialised anew.

    What a script does that calls ``get_peft_model`` after resuming, too. LP107 reports the PeftModel
    inside the PeftModel at step 0.

    Args:
        model: A model with an adapter, trained or loaded.
        config: Configuration with the same targets.

    Returns:
        The outer PeftModel.
    """
    from peft import get_peft_model

    return get_peft_model(model, config)


@_fault("B06", "LP203", "X-GenGroup/Flow-Factory#56")
def skipped_because_present(model: PeftModel, config: PeftConfig, name: str = "default") -> None:
    """Freeze the whole model, then pass over the adapter because one of that name exists.

    LP203 reports at step 0 that every tensor of the adapter is frozen.

    Args:
        model: A model with an adapter called ``name``.
        config: What the adapter would have been made from.
        name: The adapter's name.
    """
    model.requires_grad_(False)
    if name not in model.peft_config:
        model.add_adapter(name, config)


@_fault("B09", "LP404", "huggingface/trl#6688")
def merge_unmerge_cycles(model: PeftModel, cycles: int = 100) -> None:
    """Merge and unmerge again and again, as an RL loop does at every weight sync.

    In 16 bits W + BA - BA is not W, and the errors add up in the base weight that everybody believes
    frozen. LP404 reports it in the step that follows, once the drift is more than rounding of a few
    merges. Nothing happens in float32.

    Args:
        model: A model whose base weights are in 16 bits and whose adapter is not the identity.
        cycles: How often.
    """
    for _ in range(cycles):
        model.merge_adapter()
        model.unmerge_adapter()


# --- frozen, or not frozen ----------------------------------------------------------------------


@_fault("C01", "LP203", "huggingface/peft#282", "huggingface/trl#6700", "huggingface/transformers#24463")
def loaded_for_inference(base: nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap a model as ``PeftModel.from_pretrained(base, path)`` does by default: for inference.

    Every adapter tensor is frozen. An optimizer takes an empty parameter group without a word. LP203
    reports it at step 0.

    Args:
        base: The base model.
        config: The adapter's configuration; its ``inference_mode`` is set.

    Returns:
        The model that was meant to go on training.
    """
    from peft import get_peft_model

    config.inference_mode = True
    return get_peft_model(base, config)


@_fault("C03", "LP203", "huggingface/trl#3926", "huggingface/trl#4029", "huggingface/transformers#26098")
def prepared_for_kbit_after_wrapping(model: PeftModel) -> None:
    """Call ``prepare_model_for_kbit_training`` on a model that has its adapter already.

    It freezes every parameter, the adapter's among them, and installs the input-gradient hook, so
    that backward() succeeds. LP203 reports it at step 0. A model that is not quantised is marked as
    one for the call.

    Args:
        model: A model with an adapter.
    """
    from peft import prepare_model_for_kbit_training

    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    if not quantised:
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})  # type: ignore[no-untyped-call]
    if not quantised:
        model.is_loaded_in_4bit = False  # type: ignore[assignment]


@_fault("C04", "LP203", "X-GenGroup/Flow-Factory#56", "huggingface/peft#760")
def frozen_after_wrapping(model: nn.Module) -> None:
    """Run the loop that freezes the base model after the adapter was attached.

    LP203 reports it in the step in which it takes effect.

    Args:
        model: A model with an adapter.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False


@_fault("C07", "LP206", "huggingface/sentence-transformers#3274", "Blaizzy/mlx-vlm#2181")
def unfrozen_base(model: nn.Module) -> None:
    """Make every parameter trainable: a full fine-tune of which the adapter file keeps a part.

    LP206 reports it at step 0.

    Args:
        model: A model with an adapter.
    """
    model.requires_grad_(True)


# --- checkpointing ------------------------------------------------------------------------------


@_fault(
    "D01",
    "LP302",
    "locuslab/open-unlearning#178",
    "huggingface/transformers#25841",
    "huggingface/trl#2486",
    by_step=3,
)
def checkpointed_without_input_gradients(model: PeftModel) -> None:
    """Switch on reentrant checkpointing and take the input-gradient hook away.

    A reentrant checkpoint drops the graph if none of its inputs requires gradients. An adapter
    outside the blocks (``lm_head``) is enough for backward() to succeed. LP302 reports the others
    after four steps, since a part of an adapter may have no gradient in one batch for good reasons.

    Args:
        model: A PeftModel around a transformers model, with an adapter outside the checkpointed blocks.
    """
    base: Any = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    base.disable_input_require_grads()


@_fault("D04", "LP307", "Comfy-Org/ComfyUI#15846", by_step=1)
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


@_fault(
    "D02",
    "LP302",
    "2U1/Qwen-VL-Series-Finetune#193",
    "huggingface/transformers#42558",
    "modelscope/ms-swift#10214",
    by_step=3,
)
def tower_checkpointed_reentrant(tower: nn.Module) -> None:
    """Checkpoint a tower that is fed with data: pixels and waveforms carry no gradient.

    The input-gradient hook sits on the text embeddings and does not help here. The language model
    learns, the tower's adapters get None. LP302 reports them after four steps.

    Args:
        tower: A part of the model whose inputs are data.
    """
    forward = tower.forward
    # A partial, not a closure over the module: the model must stay what deepcopy and pickle know.
    tower.forward = partial(checkpoint, forward, use_reentrant=True)


# --- optimizer ----------------------------------------------------------------------------------


@_fault("E01", "LP201", "adapter-hub/adapters#260")
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


@_fault("E02", "LP201", "Lightning-Universe/lightning-GPT#17", "Lightning-AI/pytorch-lightning#18279")
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


@_fault("E06", "LP208", "huggingface/transformers#33086", "lm-sys/FastChat#2558", "modelscope/ms-swift#6009", by_step=3)
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


@_fault("E11", "LP402", "unslothai/unsloth#5747", "unslothai/notebooks#270", by_step=3)
def labels_all_masked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Mask every label, as a wrong chat template or prompt mask does.

    The gradients are exactly zero, and AdamW's weight decay moves the parameters all the same. LP402
    reports it after four steps; without weight decay it is LP303, in the same step.

    Args:
        batch: Arguments of the model, with ``labels`` or with ``input_ids``.

    Returns:
        A copy of the batch in which every label is -100.
    """
    labels: Tensor = batch["labels"] if "labels" in batch else batch["input_ids"]
    return {**batch, "labels": torch.full_like(labels, -100)}


# --- the forward passes the adapter by ----------------------------------------------------------


@_fault("G01", "LP104", "huggingface/trl#4612", "huggingface/trl#5977", "huggingface/trl#6159", by_step=1)
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


@_fault("G05", "LP303", "modelscope/ms-swift#4547", by_step=3)
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


@_fault("G07", "LP405", "X-GenGroup/Flow-Factory#186", by_step=1)
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


@_fault("G08", "LP209", "huggingface/trl#6277", "huggingface/peft#940")
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


# --- precision ----------------------------------------------------------------------------------


@_fault("H02", "LP403", "keras-team/keras-hub#2629", "verl-project/verl-omni#73", "huggingface/peft#1634", by_step=3)
def half_precision_adapter(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Cast the model with its adapter to 16 bits, without float32 master weights.

    ``lora_B`` starts at zero and moves; ``lora_A`` has values whose last digit is larger than the
    update at a learning rate of 1e-5 or so, and stands still. LP403 reports it after four steps.

    Args:
        model: A model with an adapter.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """
    model.to(dtype)


@_fault("H04", "LP406", "NVIDIA/apex#715", "zai-org/CogVideo#233", "radixark/miles#2198", by_step=3)
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


@_fault("H06", "LP401", "deepspeedai/DeepSpeed#7632", "huggingface/peft#1402", by_step=3)
def steps_swallowed(optimizer: Optimizer) -> None:
    """Let ``step()`` return without an update, as an optimizer does that believes in an overflow.

    A stand-in: the reports are of DeepSpeed's fused optimizers. LP401 reports it with the decision
    after the fourth step without a change.

    Args:
        optimizer: Any torch optimizer; its closure and its hooks still run.
    """

    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()

    hooked = Optimizer.profile_hook_step(step)
    optimizer.__class__ = type(type(optimizer).__name__, (type(optimizer),), {"step": hooked})
