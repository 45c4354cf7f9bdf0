"""What one transfer from the devices told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_probe_callbacks.facts.columns import Gradients, Update
from lora_probe_callbacks.facts.model import BaseDrift, CopiesFact, OtherAdapter, TokenRowsFact
from lora_probe_callbacks.facts.path import Look

__all__ = ["DeviceFacts"]


@dataclass(frozen=True, eq=False)
class DeviceFacts:
    """What was read from the devices for one decision.

    Attributes:
        gradients: As the optimizer is about to receive them.
        gradients_final: Nothing can change them between this reading and the update.
        no_gradient_at_all: No tensor of any optimizer has a gradient, whether it belongs to an adapter or not.
        all_non_finite: Nothing that arrived was finite.
        update: The last probed update; None if none was made since the last decision.
        gathering: The optimizers keep a state of what they have not moved in the last update.
        others: The adapters that are not expected to train.
        base_drift: Of sampled base weights.
        copies: What became of copies that an optimizer steps for the adapter; None if it holds none.
        token_rows: Of the embeddings in which new tokens can be watched.
        unsaved: Name and relative change of buffers and small frozen parameters that training has moved by itself.
        looks: Where the tensors stood before and after steps, in order, since the last decision.
        base_moved: Unit to whether its base weight has changed since it was sampled last; None if none was sampled.
    """

    gradients: Gradients = field(default_factory=lambda: Gradients.unread(0))
    gradients_final: bool = False
    no_gradient_at_all: bool = False
    all_non_finite: bool = False
    update: Update | None = None
    gathering: bool = False
    others: tuple[OtherAdapter, ...] = ()
    base_drift: BaseDrift | None = None
    copies: CopiesFact | None = None
    token_rows: tuple[TokenRowsFact, ...] = ()
    unsaved: tuple[tuple[str, float], ...] = ()
    looks: tuple[Look, ...] = ()
    base_moved: Mapping[int, bool] | None = None
