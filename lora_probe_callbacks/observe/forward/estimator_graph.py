"""What an estimator was made of: its graph, its forwards, and the tensors of its direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_probe_callbacks.observe.forward.candidate import Candidate
from lora_probe_callbacks.observe.forward.graph import walk
from lora_probe_callbacks.observe.forward.hooks import ForwardObserver
from lora_probe_callbacks.observe.model.targets import Targets
from lora_probe_callbacks.observe.model.unused import adapters_alive

__all__ = ["direction_fact", "gradient_fact", "graph_fact"]


def graph_fact(S: torch.Tensor, targets: Targets, observer: ForwardObserver, *, own: bool = False) -> dict[str, Any]:
    """Where the graph of a tensor leads, and which forwards made it.

    Args:
        S: What an estimator differentiates.
        targets: What is expected to train.
        observer: Who watched the forwards.
        own: The observer saw the estimator's forwards and no others; else the graph tells which they were.

    Returns:
        Fields of an :class:`EstimatorFact`.
    """
    slot_of = targets.slot_of()
    held = {id(p) for _, root in targets.roots for p in root.parameters()}
    found = walk([S], marks=not own)
    candidates = observer.log.candidates if own else [m for m in found.marks if isinstance(m, Candidate)]
    if not own and not S.requires_grad:
        # A forward with an adapter that is off leaves no graph; its output carries no mark.
        candidates = [c for c in observer.log.candidates if not c.carries_graph]
    fields: dict[str, Any] = {
        "forwards": tuple(c.fact(slot_of) for c in candidates),
        "graph": S.requires_grad,
        "reached": None if found.blind else frozenset(slot_of[i] for i in found.leaves if i in slot_of),
        "why_unknown": found.blind,
        "foreign": sum(isinstance(t, nn.Parameter) and i not in held for i, t in found.leaves.items()),
    }
    if not candidates and not fields["reached"] and not found.blind:
        if not S.requires_grad:
            fields["without_grad"], fields["inference"] = observer.log.without_grad, S.is_inference()
        if not fields.get("without_grad") and not fields.get("inference"):
            alive = adapters_alive([layer.module for layer in targets.inventory.layers])
            fields["elsewhere"] = alive or (("something that is not the trained model",) if own else ())
    return fields


def direction_fact(direction: object, targets: Targets) -> dict[str, Any]:
    """Which slots a direction was built on.

    Args:
        direction: An update direction (something with ``owners``), or a mapping by parameter, id or name.
        targets: What is expected to train.

    Returns:
        Fields of an :class:`EstimatorFact`.

    Raises:
        TypeError: If it is neither.
    """
    slots, foreign = _resolved(direction, targets)
    return {"direction": frozenset(slots), "direction_foreign": tuple(foreign)}


def gradient_fact(gradients: Mapping[Any, torch.Tensor | None], targets: Targets) -> dict[str, Any]:
    """Which slots got a gradient of the estimator's loss.

    Args:
        gradients: By parameter, id or name; None where there is none.
        targets: What is expected to train.

    Returns:
        Fields of an :class:`EstimatorFact`; ``zero`` is 1 where every gradient is exactly zero.
    """
    slots, foreign = _resolved(gradients, targets)
    present = {slot for slot, gradient in slots.items() if gradient is not None}
    values = [g for slot, g in slots.items() if slot in present]
    return {
        "missing": frozenset(i for i, s in enumerate(targets.slots) if i not in present and _trains(s.tensor)),
        "zero": int(bool(values) and not any(bool(g.any()) for g in values)),
        "foreign": len(foreign),
    }


def _trains(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _resolved(mapping: object, targets: Targets) -> tuple[dict[int, Any], list[str]]:
    """Slot to value, and the names of what is no parameter of the watched modules."""
    owners = getattr(mapping, "owners", None)
    if isinstance(owners, Mapping):
        tensors = getattr(mapping, "tensors", {})
        entries = [(name, None if p is None else id(p), tensors.get(name)) for name, p in owners.items()]
    elif isinstance(mapping, Mapping):
        names = {name: id(p) for _, root in targets.roots for name, p in root.named_parameters()}
        entries = [(str(_shown(key)), _id_of(key, names), value) for key, value in mapping.items()]
    else:
        raise TypeError(
            f"got a direction of type {type(mapping).__name__}, expected an UpdateDirection or a mapping by parameter, "
            "id or name"
        )
    slot_of = targets.slot_of()
    held = {id(p) for _, root in targets.roots for p in root.parameters()}
    slots = {slot_of[i]: value for _, i, value in entries if i is not None and i in slot_of}
    return slots, [name for name, i, _ in entries if i is None or (i not in slot_of and i not in held)]


def _id_of(key: object, names: Mapping[str, int]) -> int | None:
    if isinstance(key, torch.Tensor):
        return id(key)
    if isinstance(key, int):
        return key
    if not isinstance(key, str) or key in names:
        return names.get(str(key))
    ends = {i for name, i in names.items() if name.endswith(f".{key}") or key.endswith(f".{name}")}
    return ends.pop() if len(ends) == 1 else None  # named from another root


def _shown(key: object) -> object:
    return f"a tensor {tuple(key.shape)}" if isinstance(key, torch.Tensor) else key
