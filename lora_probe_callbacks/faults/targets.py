"""What is adapted, how it is scaled, and how it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_probe_callbacks.faults._fault import fault

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel


@fault("J01", "LP601", "huggingface/peft#1959", "huggingface/peft#3658", "huggingface/peft#3554")
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


@fault("J02", "LP601", "huggingface/peft#1024")
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


@fault("J03", "LP601", "hiyouga/LlamaFactory#10790", "vllm-project/vllm#41702")
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


@fault("J04", "LP606", "huggingface/peft#3009", "huggingface/peft#2545", "unslothai/unsloth#6936")
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


@fault("J05", "LP607", "huggingface/peft#2777", "huggingface/peft#2864", "huggingface/transformers#45127")
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


@fault("J06", "LP604", "huggingface/peft#1457", "huggingface/peft#2898", "hiyouga/LlamaFactory#6749")
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


@fault("J07", "LP601", "unslothai/unsloth#9331")
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


@fault("J08", "LP605", "meta-pytorch/torchtune#2250")
def magnitude_frozen(model: nn.Module) -> None:
    """Freeze DoRA's magnitude: the run is one of LoRA under another name.

    LP605 reports it at step 0.

    Args:
        model: A model with a DoRA adapter.
    """
    for name, tensor in model.named_parameters():
        if "lora_magnitude_vector" in name:
            tensor.requires_grad_(False)


@fault("J09", "LP504", "huggingface/peft#1929", "huggingface/peft#1930", "huggingface/peft#1626")
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


@fault("J11", "LP504", "huggingface/peft#1042", "saforem2/ezpz#207")
def initialised_after_wrapping(model: PeftModel) -> None:
    """Call ``init_weights()`` of a model that has its adapter already: B is no longer zero.

    LP504 reports it at step 0, given ``resumed=False``.

    Args:
        model: A PeftModel around a transformers model.
    """
    base: Any = model.get_base_model()
    base.init_weights()


@fault("J13", "LP602", "huggingface/peft#3582", "huggingface/peft#3588", "axolotl-ai-cloud/axolotl#3673")
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


@fault("J14", "LP504", "huggingface/peft#1525", "huggingface/peft#1532", "yxli2123/LoftQ#23")
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
