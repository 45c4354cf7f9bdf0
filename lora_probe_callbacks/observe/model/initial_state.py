"""The values in which training starts: is the adapter the identity, is it alive?

Read once, before the first training forward. The size of BA is taken from products of r x r, so that no
matrix of the size of a weight is made: |BA|^2 = tr(B'B AA').
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import PeftConfig
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer

from lora_probe_callbacks.facts import StartFact, UnitStart
from lora_probe_callbacks.observe.device.transfer import Readout, local
from lora_probe_callbacks.observe.model.inventory import Unit
from lora_probe_callbacks.observe.model.wrappers import is_shard

__all__ = ["moves_base", "natural_scaling", "read_start"]

# Initialisations that begin with a part of the base weight in BA, and take it out of that weight (peft 0.21).
_MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def moves_base(config: PeftConfig | None) -> bool:
    """Tell whether an initialisation takes the adapter's product out of the base weight.

    Args:
        config: PEFT's configuration of an adapter.

    Returns:
        True for PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA.
    """
    kind = getattr(config, "init_lora_weights", True)
    return isinstance(kind, str) and kind.lower().startswith(_MOVING)


def natural_scaling(unit: Unit) -> float | None:
    """The factor of BA that rank and alpha of one unit say.

    Args:
        unit: One adapter in one layer.

    Returns:
        alpha/r, or alpha/sqrt(r) under rsLoRA; None where the method has no such factor, or changes it by design.
    """
    module, name = unit.layer.module, unit.adapter
    if not _of_two_factors(module) or not isinstance(module, LoraLayer) or name not in module.scaling:
        return None
    r, alpha = module.r.get(name), module.lora_alpha.get(name)
    if not isinstance(r, int) or not isinstance(alpha, int | float) or r < 1:
        return None
    return alpha / float(r**0.5 if module.use_rslora.get(name) else r)


def read_start(
    units: Sequence[Unit], configs: Mapping[str, PeftConfig], *, framework_step: int, optimizer_state: bool
) -> StartFact:
    """Read what the units hold. One transfer to the host.

    Args:
        units: The expected ones.
        configs: Adapter to its configuration.
        framework_step: The framework's number of the step that comes.
        optimizer_state: The optimizer holds a state for some of their tensors.

    Returns:
        The fact.
    """
    readout = Readout()
    tickets: list[range | None] = []
    for unit in units:
        pair = _pair(unit)
        tickets.append(None if pair is None else readout.add(torch.stack(_measure(*pair))))
    readout.send()
    readout.receive()
    facts: list[UnitStart | None] = []
    for unit, ticket in zip(units, tickets, strict=True):
        if ticket is None:
            facts.append(None)
            continue
        a, b, product = readout.get(ticket)
        facts.append(UnitStart(a, b, product, moves_base(configs.get(unit.adapter))))
    return StartFact(tuple(facts), framework_step, optimizer_state)


def _of_two_factors(module: object) -> bool:
    """A LoRA layer, other than AdaLoRA's: that has a third factor, and a scaling of its own."""
    return isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer)


def _pair(unit: Unit) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A and B of a unit of two factors."""
    if not _of_two_factors(unit.layer.module):
        return None
    by_role = {role: [t for s in unit.slots if s.role == role and (t := s.tensor) is not None] for role in "AB"}
    by_role["B"] = [t for t in by_role["B"] if t.ndim > 1]  # lora_bias gives B a vector of its own
    if len(by_role["A"]) != 1 or len(by_role["B"]) != 1:
        return None
    a, b = by_role["A"][0], by_role["B"][0]
    if "meta" in (a.device.type, b.device.type) or not local(a).numel() or not local(b).numel():
        return None
    return a, b


@torch.no_grad()
def _measure(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    sharded = is_shard(a) or is_shard(b)
    a, b = local(a).float(), local(b).float()
    sizes = [a.abs().amax(), b.abs().amax()]
    rank = min(a.shape[0], b.shape[-1]) if a.ndim == b.ndim == 2 else 0
    # Convolutions and shards: whether they are zero is all that is asked.
    if sharded or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not rank:
        return [*sizes, torch.minimum(sizes[0], sizes[1]).sign()]
    # Divided by the largest elements first: squares of squares of small numbers vanish.
    a, b = a / sizes[0].clamp_min(1e-30), b / sizes[1].clamp_min(1e-30)
    inner, outer = b.T @ b, a @ a.T
    square = (inner * outer).sum().clamp_min(0)
    return [*sizes, (square / (inner.trace() * outer.trace()).clamp_min(1e-30)).sqrt()]
