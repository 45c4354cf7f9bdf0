"""What the model and the optimizers hold at this moment, as one fact."""

from __future__ import annotations

from lora_probe_callbacks.facts import Mode, ModelFacts
from lora_probe_callbacks.observe.model.layers import Layers
from lora_probe_callbacks.observe.model.owners import Owners
from lora_probe_callbacks.observe.model.ownership import tensors_of
from lora_probe_callbacks.observe.model.targets import Targets

__all__ = ["model_facts"]


def model_facts(
    targets: Targets, owners: Owners, layers: Layers, modes: tuple[Mode, ...], active: tuple[str, ...]
) -> ModelFacts:
    """Take a snapshot. What needs values from a device, or is read once, is added by others.

    Args:
        targets: What is expected to train.
        owners: Who owns it, as of the last look.
        layers: The layers of the expected units.
        modes: State of the units.
        active: Names of the active adapters.

    Returns:
        The fact.
    """
    inventory, config = targets.inventory, targets.config
    replaced, foreign = owners.replaced()
    slots = owners.columns()
    return ModelFacts(
        expected=targets.expected,
        declared=config.names is not None,
        resumed=config.resumed,
        new_tokens=tuple(config.new_token_ids),
        slots=slots,
        modes=modes,
        active=active,
        trainable_bases=layers.trainable_bases(),
        replaced=replaced,
        foreign_in_optimizer=foreign,
        optimizer_tensors=len(tensors_of(targets.optimizers)),
        optimizers=len(targets.optimizers),
        others_train=not slots.requires_grad.all() and owners.others_train(),
        why_not_owned=owners.why_not_owned(),
        nested=tuple(inventory.nested),
        rewrapped=tuple(inventory.rewrapped),
        unloaded=tuple(inventory.unloaded),
        vanished=() if inventory.unloaded else owners.vanished(),
        packed=layers.packed(),
    )
