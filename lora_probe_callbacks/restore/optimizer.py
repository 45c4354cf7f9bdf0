"""Let a real optimizer take its next step, and take it back bit by bit."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from lora_probe_callbacks.restore.model import emptied
from lora_probe_callbacks.restore.random import random_state_restored


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return the real optimizer below Accelerate's and Lightning's, which hold it in `.optimizer`."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def needs_closure(optimizer: Optimizer) -> bool:
    """Tell whether `step` runs the model itself, as LBFGS does, and cannot do without."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


@contextlib.contextmanager
def trial_step(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the optimizer has stepped; on exit it has not, nor has anything it owns.

    All that hangs on the optimizer is saved and written back: its tensors and their
    gradients, the state of every tensor (keys that the step adds are gone again), flags such
    as `_opt_called` and bitsandbytes' `initialized`, and the random streams (stochastic
    rounding). Step hooks are suspended: a moving average of the weights would count a step
    that never was. Version counters stay, as the contents do, so a graph that was built
    before the trial can still run its backward.

    Args:
        optimizer: the innermost optimizer, its gradients in place.

    Raises:
        ValueError: if its `step` cannot run without a closure.
    """
    # The class's own step: a wrapper on the instance (LR schedulers, trainers) counts calls.
    step = type(optimizer).step
    if needs_closure(optimizer):
        raise ValueError(
            f"got {type(optimizer).__name__}, whose step() needs a closure that runs the model again; "
            "expected an optimizer that steps from the gradients at hand. "
            "Take the step and use UpdateDirection.from_last_step."
        )
    tensors: list[torch.Tensor] = []
    restore = _capture(vars(optimizer), {}, tensors)
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    with contextlib.ExitStack() as undo:
        undo.enter_context(random_state_restored())
        undo.enter_context(torch.no_grad())
        undo.enter_context(_unsafe_preserve_version_counter(tuple(tensors)))
        undo.callback(restore)
        with contextlib.ExitStack() as suspended:
            for registry in hooks:
                suspended.enter_context(emptied(registry))
            step(optimizer)
        yield


def _capture(value: Any, seen: dict[int, Any], tensors: list[torch.Tensor]) -> Callable[[], Any]:
    """Save a value and all that it holds.

    Args:
        value: a tensor, a dict or a list, nested at will; anything else is kept by reference.
        seen: the values already captured, by id: param_groups and state share their tensors.
        tensors: receives every tensor that was saved.

    Returns:
        A function that puts the saved contents back into the same objects and returns `value`.
    """
    if id(value) in seen or not isinstance(value, torch.Tensor | dict | list | tuple):
        return lambda: value
    seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        return _capture_tensor(value, seen, tensors)
    if isinstance(value, dict):
        entries = [(key, _capture(entry, seen, tensors)) for key, entry in value.items()]

        def restore_dict() -> Any:
            restored = [(key, restore()) for key, restore in entries]
            value.clear()
            value.update(restored)
            return value

        return restore_dict
    parts = [_capture(entry, seen, tensors) for entry in value]

    def restore_sequence() -> Any:
        restored = [restore() for restore in parts]
        if isinstance(value, list):
            value[:] = restored
        return value

    return restore_sequence


def _capture_tensor(tensor: torch.Tensor, seen: dict[int, Any], tensors: list[torch.Tensor]) -> Callable[[], Any]:
    storage = tensor.detach()  # shares the memory: survives an optimizer that assigns `p.data`
    contents = storage.clone()
    gradient = tensor.grad if tensor.is_leaf else None
    restore_gradient = _capture(gradient, seen, tensors)
    tensors.append(tensor)

    def restore_tensor() -> Any:
        if tensor.data_ptr() != storage.data_ptr():
            tensor.data = storage
        storage.copy_(contents)
        if tensor.is_leaf:
            tensor.grad = restore_gradient()
        return tensor

    return restore_tensor
