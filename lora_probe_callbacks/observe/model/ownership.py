"""Which tensor objects the optimizers own, and with which settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch.optim import Optimizer

__all__ = [
    "Ownership",
    "found_inf",
    "grad_scale",
    "groups_of",
    "owner_of",
    "ownership",
    "tensors_of",
    "unwrap_optimizer",
]


class Ownership(NamedTuple):
    """The optimizer and the settings under which one tensor is stepped."""

    optimizer: int
    learning_rate: float
    weight_decay: float


def unwrap_optimizer(optimizer: object) -> Optimizer:
    """Find the torch optimizer inside Accelerate's or Lightning's wrapper.

    The wrappers have no step hooks of their own.

    Args:
        optimizer: An optimizer or a wrapper with an ``optimizer`` attribute, nested at will.

    Returns:
        The innermost optimizer.

    Raises:
        TypeError: If there is none.
    """
    inner, seen = optimizer, 0
    while seen < 8 and hasattr(inner, "optimizer"):
        inner, seen = inner.optimizer, seen + 1
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"got {type(optimizer).__name__}, expected a torch.optim.Optimizer or a wrapper around one: "
            "pass the object whose step() the training loop calls"
        )
    return inner


def groups_of(optimizers: Sequence[Optimizer]) -> list[Ownership]:
    """The settings of every parameter group, those of the first optimizer first.

    Args:
        optimizers: Torch optimizers.

    Returns:
        One entry a group.
    """
    found = []
    for index, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            rate = group.get("lr", float("nan"))
            # A tensor rate on a device would cost a transfer of its own; such a group is read as unknown.
            known = not isinstance(rate, torch.Tensor) or rate.device.type == "cpu"
            found.append(
                Ownership(
                    optimizer=index,
                    learning_rate=float(rate) if known else float("nan"),
                    weight_decay=float(group.get("weight_decay") or 0.0),
                )
            )
    return found


def owner_of(optimizers: Sequence[Optimizer], took_over: Sequence[int] = ()) -> dict[int, int]:
    """Map the id of every tensor that an optimizer owns to its parameter group.

    Args:
        optimizers: Torch optimizers.
        took_over: Those that have taken over what they share with others, the last one last.

    Returns:
        Tensor id to the index in :func:`groups_of` of the first group that holds it, or of one that took over.
    """
    groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
    of_group = [number for number, optimizer in enumerate(optimizers) for _ in optimizer.param_groups]
    owners: dict[int, int] = {}
    for number in range(len(groups) - 1, -1, -1):  # the first owner has the last word
        owners.update(dict.fromkeys(map(id, groups[number]), number))
    for optimizer in took_over:
        for number in (n for n, of in enumerate(of_group) if of == optimizer):
            owners.update(dict.fromkeys(map(id, groups[number]), number))
    return owners


def ownership(optimizers: Sequence[Optimizer]) -> dict[int, Ownership]:
    """Map the id of every tensor that an optimizer owns to its settings.

    Args:
        optimizers: Torch optimizers.

    Returns:
        Tensor id to the first group that holds it.
    """
    groups = groups_of(optimizers)
    return {tensor: groups[number] for tensor, number in owner_of(optimizers).items()}


def tensors_of(optimizers: Iterable[Optimizer]) -> list[torch.Tensor]:
    """All tensors in all groups."""
    groups = (group["params"] for optimizer in optimizers for group in optimizer.param_groups)
    return list(chain.from_iterable(groups))


def found_inf(optimizer: Optimizer) -> torch.Tensor | None:
    """What GradScaler left on a fused optimizer: not None while it decides whether to skip the step."""
    flag = getattr(optimizer, "found_inf", None)
    return flag if isinstance(flag, torch.Tensor) else None


def grad_scale(optimizer: Optimizer) -> torch.Tensor | None:
    """The scale that a fused optimizer will divide its gradients by, or None."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, torch.Tensor) else None
