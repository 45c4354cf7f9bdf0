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
    from peft import LoraConfig, PeftConfig, PeftModel

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

    _exchange_step(optimizer, step)


def _exchange_step(optimizer: Optimizer, step: Callable[..., Any]) -> None:
    hooked = Optimizer.profile_hook_step(step)
    optimizer.__class__ = type(type(optimizer).__name__, (type(optimizer),), {"step": hooked})


# --- more of the first families -----------------------------------------------------------------


@_fault("A04", "LP101", "huggingface/peft#3580", "huggingface/peft#3487")
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


@_fault("A08", "LP109", "NVIDIA-NeMo/Megatron-Bridge#5945", by_step=3)
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


@_fault("A09", "LP504", "huggingface/trl#1193", "huggingface/trl#4723", "huggingface/trl#6591")
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


@_fault("A10", "LP109", "huggingface/trl#1311", "huggingface/trl#1843", "huggingface/trl#4023", by_step=3)
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


@_fault("A11", "LP207", "huggingface/peft#2759", "huggingface/peft#2928")
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


@_fault("B04", "LP504", "huggingface/lerobot#3459")
def resumed_and_wrapped_anew(model: PeftModel, config: PeftConfig) -> PeftModel:
    """Wrap the base model of a resumed model again before the optimizer is built: what was loaded is gone.

    LP504 reports it at step 0, given ``resumed=True``.

    Args:
        model: A model whose adapter was restored.
        config: Configuration with the same targets.

    Returns:
        A PeftModel with a fresh adapter.
    """
    from peft import get_peft_model

    return get_peft_model(model.get_base_model(), config)


@_fault("C05", "LP203", "huggingface/peft#1346", "huggingface/peft#1410")
def only_default_marked_trainable(model: nn.Module) -> None:
    """Mark as trainable what is called "default", as peft 0.7 did, in a model whose adapter has another name.

    LP203 reports it at step 0.

    Args:
        model: A model with an adapter of another name.
    """
    for name, tensor in model.named_parameters():
        tensor.requires_grad_("lora_" in name and ".default" in name)


# --- more of the optimizer ----------------------------------------------------------------------


@_fault("E07", "LP210", "huggingface/peft#3499", "huggingface/peft#3503")
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


@_fault("E08", "LP407", "radixark/miles#2572")
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


@_fault("E10", "LP501", "bitsandbytes-foundation/bitsandbytes#152", "kohya-ss/sd-scripts#523", by_step=1)
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


# --- more of the forward ------------------------------------------------------------------------


@_fault("G03", "LP104", "huggingface/peft#2274", "huggingface/peft#1612", "state-spaces/mamba#279", by_step=1)
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


@_fault("G06", "LP301", "huggingface/peft#291", "pytorch/pytorch#105211", "Lightning-AI/pytorch-lightning#19810")
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


# --- more of precision --------------------------------------------------------------------------


@_fault("H03", "LP408", "AndreasBergmeister/ram#6", by_step=3)
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


# --- targets, scaling, initialisation -----------------------------------------------------------


@_fault("J01", "LP601", "huggingface/peft#1959", "huggingface/peft#3658", "huggingface/peft#3554")
def misspelt_target(base: nn.Module, config: LoraConfig, wrong: str = "gate_porj") -> PeftModel:
    """Ask for one target too many, of which the model has none.

    PEFT raises only if the whole list matches nothing. LP601 warns at step 0.

    Args:
        base: The base model.
        config: A LoraConfig with a list of targets that match.
        wrong: The name that matches nothing.

    Returns:
        The model with adapters on the other targets.
    """
    from peft import get_peft_model

    config.target_modules = [*_targets(config), wrong]
    return get_peft_model(base, config)


def _targets(config: LoraConfig) -> list[str]:
    return sorted(config.target_modules or ())


@_fault("J02", "LP601", "huggingface/peft#1024")
def head_dropped_by_layer_choice(base: nn.Module, config: LoraConfig) -> PeftModel:
    """Choose layers by their index, as peft up to 0.6 did: ``lm_head``, which has none, is dropped.

    peft 0.21 adapts it all the same. LP601 warns at step 0.

    Args:
        base: A causal language model.
        config: A LoraConfig with a list of targets.

    Returns:
        The model, whose configuration names a head that carries no adapter.
    """
    from peft import get_peft_model

    config.layers_to_transform = [0]
    model = get_peft_model(base, config)
    for held in model.peft_config.values():
        targets: Any = held
        targets.target_modules = {*targets.target_modules, "lm_head"}
    return model


@_fault("J03", "LP601", "hiyouga/LlamaFactory#10790", "vllm-project/vllm#41702")
def one_tower_only(base: nn.Module, config: LoraConfig, tower: str) -> PeftModel:
    """Turn a list of targets into a pattern that is met in one tower of several.

    LP601 reports at step 0 that a tower named in ``expect_targets`` carries nothing.

    Args:
        base: A model of several towers.
        config: A LoraConfig with a list of targets.
        tower: Part of the names of the tower that gets adapters.

    Returns:
        The model.
    """
    from peft import get_peft_model

    config.target_modules = rf".*{tower}.*\.({'|'.join(_targets(config))})"
    return get_peft_model(base, config)


@_fault("J04", "LP606", "huggingface/peft#3009", "huggingface/peft#2545", "unslothai/unsloth#6936")
def experts_that_are_no_modules(width: int = 12, experts: int = 3) -> nn.Module:
    """Make a block whose shared expert is a list of linear layers and whose routed experts are fused parameters.

    ``target_modules=["up_proj", "down_proj"]`` meets the shared expert alone. transformers' own mixtures are
    converted by peft 0.21, other classes are not. LP606 warns at step 0.

    Args:
        width: Of inputs and outputs.
        experts: How many.

    Returns:
        The block, to be wrapped.
    """
    return _Mixture(width, experts)


class _Experts(nn.Module):
    """Two matrices an expert, one parameter for all of them."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(experts, 2 * width, width) / width)
        self.down_proj = nn.Parameter(torch.randn(experts, width, 2 * width) / width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("...i,eoi->...eo", x, self.up_proj).relu()  # [..., experts, 2 width]
        return torch.einsum("...eo,eio->...i", hidden, self.down_proj)


class _SharedExpert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up_proj(x).relu()
        return self.down_proj(hidden)  # type: ignore[no-any-return]


class _Mixture(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.shared = _SharedExpert(width)
        self.experts = _Experts(width, experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x) + self.experts(x)  # type: ignore[no-any-return]


@_fault("J05", "LP607", "huggingface/peft#2777", "huggingface/peft#2864", "huggingface/transformers#45127")
def head_copied_from_a_tie(base: nn.Module, config: LoraConfig) -> PeftModel:
    """Put the head of a model with tied embeddings into ``modules_to_save``.

    The copy learns, the embedding stays, and a merged checkpoint ties them again. LP607 warns at step 0.

    Args:
        base: A model whose embedding and head are one weight.
        config: A LoraConfig.

    Returns:
        The model.
    """
    from peft import get_peft_model

    config.modules_to_save = ["lm_head"]
    return get_peft_model(base, config)


@_fault("J06", "LP604", "huggingface/peft#1457", "huggingface/peft#2898", "hiyouga/LlamaFactory#6749")
def tokens_added_before_wrapping(base: nn.Module, config: PeftConfig, tokens: int = 4) -> PeftModel:
    """Add tokens to the vocabulary, then attach an adapter that does not hold their rows.

    LP604 reports it at step 0, given ``new_token_ids``.

    Args:
        base: A language model.
        config: A configuration without the embedding.
        tokens: How many.

    Returns:
        The model, whose new rows are random and frozen.
    """
    from peft import get_peft_model

    model: Any = base
    model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + tokens)
    return get_peft_model(model, config)


@_fault("J07", "LP601", "unslothai/unsloth#9331")
def target_filtered_out(base: nn.Module, config: LoraConfig, unsupported: str = "lm_head") -> PeftModel:
    """Drop a target on the way to PEFT, as a wrapper does with what it does not support.

    LP601 reports it at step 0, given ``expect_targets=(unsupported,)``.

    Args:
        base: The base model.
        config: A LoraConfig whose targets name it.
        unsupported: The target that is dropped.

    Returns:
        The model.
    """
    from peft import get_peft_model

    config.target_modules = [name for name in _targets(config) if name != unsupported]
    return get_peft_model(base, config)


@_fault("J08", "LP605", "meta-pytorch/torchtune#2250")
def magnitude_frozen(model: nn.Module) -> None:
    """Freeze DoRA's magnitude: the run is one of LoRA under another name.

    LP605 reports it at step 0.

    Args:
        model: A model with a DoRA adapter.
    """
    for name, tensor in model.named_parameters():
        if "lora_magnitude_vector" in name:
            tensor.requires_grad_(False)


@_fault("J09", "LP504", "huggingface/peft#1929", "huggingface/peft#1930", "huggingface/peft#1626")
def principal_part_in_the_adapter(base: nn.Module, config: LoraConfig) -> PeftModel:
    """Initialise with PiSSA, where the loss compares with the model without its adapters.

    The principal part is in the adapter and no more in the base weight: without adapters the model is a
    residual that nobody trained. LP504 reports it at step 0, given ``reference="disabled"``.

    Args:
        base: The base model.
        config: A LoraConfig.

    Returns:
        The model.
    """
    from peft import get_peft_model

    config.init_lora_weights = "pissa"
    return get_peft_model(base, config)


@_fault("J11", "LP504", "huggingface/peft#1042", "saforem2/ezpz#207")
def initialised_after_wrapping(model: PeftModel) -> None:
    """Call ``init_weights()`` of a model that has its adapter already: B is no longer zero.

    LP504 reports it at step 0, given ``resumed=False``.

    Args:
        model: A PeftModel around a transformers model.
    """
    base: Any = model.get_base_model()
    base.init_weights()


@_fault("J13", "LP602", "huggingface/peft#3582", "huggingface/peft#3588", "axolotl-ai-cloud/axolotl#3673")
def pattern_that_matches_nothing(base: nn.Module, config: LoraConfig, key: str = "q_porj") -> PeftModel:
    """Ask for another rank in layers that do not exist.

    peft 0.21 warns of it, earlier ones do not. LP602 warns at step 0.

    Args:
        base: The base model.
        config: A LoraConfig.
        key: The key that matches nothing.

    Returns:
        The model, with the default rank everywhere.
    """
    from peft import get_peft_model

    config.rank_pattern = {key: 16}
    return get_peft_model(base, config)


@_fault("J14", "LP504", "huggingface/peft#1525", "huggingface/peft#1532", "yxli2123/LoftQ#23")
@torch.no_grad()
def quantisation_error_in_the_adapter(model: PeftModel, levels: int = 16) -> None:
    """Put into the adapter what quantising takes from the base weight, as LoftQ does.

    Right with that base weight alone: where the loss compares with the model without its adapters, or the adapter
    meets the original weight, the error is applied in full. (PEFT's own LoftQ needs a GPU.) LP504 reports it at
    step 0, given ``reference="disabled"``.

    Args:
        model: A model with a LoRA adapter on linear layers.
        levels: Of the quantised weight.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    for layer in layers:
        weight = layer.base_layer.weight
        step = 2 * weight.abs().max() / levels
        quantised = (weight / step).round() * step
        u, s, v = torch.linalg.svd(weight - quantised, full_matrices=False)
        for name, a in layer.lora_A.items():
            rank = a.weight.shape[0]
            a.weight.copy_(s[:rank].sqrt()[:, None] * v[:rank])
            layer.lora_B[name].weight.copy_(u[:, :rank] * s[:rank].sqrt() / layer.scaling[name])
        weight.copy_(quantised)
    for config in model.peft_config.values():
        config.init_lora_weights = "loftq"  # type: ignore[attr-defined]
