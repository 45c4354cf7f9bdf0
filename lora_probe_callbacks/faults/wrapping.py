"""Merged, unloaded, wrapped again; frozen, or not frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lora_probe_callbacks.faults._fault import fault

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@fault("B01", "LP103", "huggingface/trl#2873", "huggingface/trl#6688", "huggingface/peft#2437")
def left_merged(model: PeftModel) -> None:
    """Merge the adapter, as for a generation or a weight sync, and do not unmerge it.

    A merged layer calls its base layer alone. The merged base weight contains the adapter, so the
    loss is exactly what it was, and ``requires_grad`` is still True. LP103 reports it in the step in
    which the first forward runs merged.

    Args:
        model: A model with an adapter.
    """
    model.merge_adapter()


@fault("B02", "LP103", "huggingface/trl#4713", "huggingface/trl#956")
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


@fault("B03", "LP202", "huggingface/lerobot#3459", "huggingface/peft#793")
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


@fault("B04", "LP107", "huggingface/lerobot#3459")
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


@fault("B06", "LP203", "X-GenGroup/Flow-Factory#56")
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


@fault("B09", "LP404", "huggingface/trl#6688")
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


@fault("C01", "LP203", "huggingface/peft#282", "huggingface/trl#6700", "huggingface/transformers#24463")
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


@fault("C03", "LP203", "huggingface/trl#3926", "huggingface/trl#4029", "huggingface/transformers#26098")
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


@fault("C04", "LP203", "X-GenGroup/Flow-Factory#56", "huggingface/peft#760")
def frozen_after_wrapping(model: nn.Module) -> None:
    """Run the loop that freezes the base model after the adapter was attached.

    LP203 reports it in the step in which it takes effect.

    Args:
        model: A model with an adapter.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False


@fault("C07", "LP206", "huggingface/sentence-transformers#3274", "Blaizzy/mlx-vlm#2181")
def unfrozen_base(model: nn.Module) -> None:
    """Make every parameter trainable: a full fine-tune of which the adapter file keeps a part.

    LP206 reports it at step 0.

    Args:
        model: A model with an adapter.
    """
    model.requires_grad_(True)


@fault("B04", "LP504", "huggingface/lerobot#3459")
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


@fault("C05", "LP203", "huggingface/peft#1346", "huggingface/peft#1410")
def only_default_marked_trainable(model: nn.Module) -> None:
    """Mark as trainable what is called "default", as peft 0.7 did, in a model whose adapter has another name.

    LP203 reports it at step 0.

    Args:
        model: A model with an adapter of another name.
    """
    for name, tensor in model.named_parameters():
        tensor.requires_grad_("lora_" in name and ".default" in name)
