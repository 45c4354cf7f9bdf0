"""Leave a model exactly as it was found."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from lora_probe_callbacks.restore.module_state import ActiveAdapters, Buffers
from lora_probe_callbacks.restore.random import random_state_restored
from lora_probe_callbacks.restore.tree import Tree

__all__ = [
    "eager",
    "emptied",
    "holding",
    "only_trainable",
    "own_gradients",
    "requires_grad_restored",
    "untouched",
]


@contextlib.contextmanager
def untouched(model: Tree) -> Iterator[None]:
    """Restore on exit whatever a loss function may change by calling the model.

    That is: the random streams, train/eval mode, requires_grad, buffers (running statistics),
    and which adapters PEFT has active. Contents are written back only where they changed.
    """
    modules = model.modules.values()
    modes = [module.training for module in modules]
    adapters = ActiveAdapters(modules)
    with contextlib.ExitStack() as undo:
        undo.callback(Buffers(modules).put_back)  # the last: to compare them waits for the device, the rest need not
        undo.enter_context(random_state_restored())
        undo.enter_context(requires_grad_restored(model.parameters.values()))
        try:
            yield
        finally:
            for module, training in zip(modules, modes, strict=True):
                if module.training != training:
                    module.training = training
            adapters.put_back()


@contextlib.contextmanager
def requires_grad_restored(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Put the requires_grad of some parameters back on exit."""
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def eager(outside: Sequence[nn.Module]) -> Iterator[None]:
    """Run compiled parts as they are written, and keep DDP from reducing gradients.

    A compiled call does not see what is changed for one forward (torch 2.13).

    Args:
        outside: the wrappers around the module, and all modules in it.
    """
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # By type: DDP's metaclass is ABCMeta, to which isinstance is slow.
        kinds = {kind for kind in set(map(type, outside)) if issubclass(kind, nn.parallel.DistributedDataParallel)}
        for module in outside if kinds else ():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


@contextlib.contextmanager
def only_trainable(model: Tree, tensors: Collection[torch.Tensor]) -> Iterator[None]:
    """Let exactly these parameters require a gradient, and keep reentrant checkpoints alive.

    A reentrant checkpoint runs its backward only if one of its inputs requires a gradient;
    with the embeddings frozen none does, so their outputs are made to.
    """
    wanted = {id(tensor) for tensor in tensors}
    hooks = [
        module.register_forward_hook(_require_input_gradient)
        for module in model.modules.values()
        if isinstance(module, nn.Embedding)
    ]
    with requires_grad_restored(model.parameters.values()):
        try:
            for parameter in model.parameters.values():
                if parameter.requires_grad != (id(parameter) in wanted):
                    parameter.requires_grad_(not parameter.requires_grad)
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _require_input_gradient(_module: nn.Module, _args: Any, output: Any) -> Any:
    if not torch.is_grad_enabled() or not isinstance(output, torch.Tensor) or output.requires_grad:
        return output
    # A copy: models may write image features into the embeddings, which autograd forbids on a leaf.
    return output.requires_grad_().clone()


@contextlib.contextmanager
def own_gradients(tensors: Collection[torch.Tensor]) -> Iterator[None]:
    """Give parameters an empty `.grad` of their own, with no hook on it, for a while.

    `backward()` is the only way through a reentrant checkpoint; what it accumulates, and the
    hooks that it would fire (clipping, an optimizer fused into the backward), are not meant
    for the training that goes on around.
    """
    former = [(tensor, tensor.grad) for tensor in tensors]
    with contextlib.ExitStack() as undo:
        for tensor in tensors:
            for hooks in (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)):
                if hooks:
                    undo.enter_context(emptied(hooks))
            tensor.grad = None
        try:
            yield
        finally:
            for tensor, gradient in former:
                tensor.grad = gradient


@contextlib.contextmanager
def holding(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, parameters hold other values; on exit they hold their own again, bit by bit.

    Their version counters stay as well, as the contents do: a graph that was built before stays valid.

    Args:
        tensors: Parameters.
        values: What each of them holds inside.

    Yields:
        Nothing.
    """
    own = [tensor.detach().clone() for tensor in tensors]
    with _unsafe_preserve_version_counter(tuple(tensors)):
        try:
            _write(tensors, values)
            yield
        finally:
            _write(tensors, own)


@torch.no_grad()
def _write(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    if tensors:
        torch._foreach_copy_(list(tensors), list(values))


@contextlib.contextmanager
def emptied(registry: Any) -> Iterator[None]:
    """Empty a dict in place, for those who hold a reference to it, and fill it again on exit."""
    items = dict(registry)
    registry.clear()
    try:
        yield
    finally:
        registry.update(items)
