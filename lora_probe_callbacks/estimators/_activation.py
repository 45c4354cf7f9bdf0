"""The PEFT module inside a model, and activating an adapter of it for one forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from lora_probe_callbacks.restore.model import requires_grad_restored
from lora_probe_callbacks.restore.module_state import ActiveAdapters

# On which modules PEFT switches adapters (peft 0.21).
_HOLDERS = (PeftModel, BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)


def peft_module(model: nn.Module) -> nn.Module:
    """Find the outermost module that PEFT or transformers treats as the model with the adapters.

    Args:
        model: That module, or whatever holds it: DDP, `torch.compile`, a LightningModule.

    Returns:
        The `PeftModel`; else the transformers model with native adapters; else `model` itself.

    Raises:
        ValueError: If there is no PEFT layer, or several PEFT models side by side.
    """
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, PeftModel)]
    if not found and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        found = [module for module in model.modules() if isinstance(module, PreTrainedModel)] or [model]
    if not found:
        raise ValueError(
            f"got {type(model).__name__} without any PEFT layer, expected a PeftModel or a module that holds "
            "one: pass the model that get_peft_model returned"
        )
    inside = set(found[0].modules())
    if beside := [module for module in found if module not in inside]:
        raise ValueError(
            f"got {type(model).__name__} with {1 + len(beside)} PEFT models side by side, expected one: "
            "pass the one that is trained"
        )
    return found[0]


@contextmanager
def activated(policy: nn.Module, adapters: list[str]) -> Iterator[bool]:
    """Activate and enable exactly these adapters, and put everything back on exit.

    PEFT's `set_adapter` also unfreezes what it activates and freezes the rest. That is undone at once: a
    reference adapter must not start to train because its log-probs were asked for. Where the
    adapters are active already nothing is touched.

    Args:
        policy: From `peft_module`.
        adapters: Names.

    Yields:
        Whether anything had to be switched.

    Raises:
        ValueError: If an adapter is not there.
        RuntimeError: If an adapter is merged.
    """
    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    known = {name for layer in layers for kind in layer.adapter_layer_names for name in getattr(layer, kind)}
    if not adapters or not known.issuperset(adapters):
        raise ValueError(f"got adapter {adapters}, expected one or more of {sorted(known)}")
    if merged := {name for layer in layers for name in layer.merged_adapters}:
        raise RuntimeError(
            f"got adapters {sorted(merged)} merged into the base weights, expected none: a merged adapter "
            "gets no gradient, and switching adapters would unmerge it; call unmerge_adapter() first"
        )
    if is_active(policy, adapters):
        yield False
        return
    holders = [module for module in policy.modules() if isinstance(module, _HOLDERS)]
    before = ActiveAdapters(holders)
    try:
        with requires_grad_restored(policy.parameters()):
            _activate(policy, adapters)
        yield True
    finally:
        before.put_back()


def is_active(policy: nn.Module, adapters: list[str]) -> bool:
    """Return whether exactly these adapters are active and enabled on every layer."""
    for module in policy.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # modules_to_save, trainable tokens
            name = module.check_set_adapter(adapters)
            wanted = [name] if name in module._adapters else []
        elif isinstance(module, BaseTunerLayer):
            wanted = [*adapters]
        else:
            continue
        if module.disable_adapters or list(module.active_adapters) != wanted:
            return False
    return True


def _activate(policy: nn.Module, adapters: list[str]) -> None:
    set_adapter(policy, adapters)
    for module in policy.modules():
        if isinstance(module, PeftModel):
            module.active_adapter = adapters[0]  # one name, by which it looks up a config
        elif isinstance(module, BaseTuner):
            module.active_adapter = adapters
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.enable_adapters(True)
