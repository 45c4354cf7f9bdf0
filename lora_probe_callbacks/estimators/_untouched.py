"""Leave a model and the random streams exactly as they were found."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lora_probe_callbacks.estimators._owners import Tree


@contextlib.contextmanager
def random_state_restored() -> Iterator[None]:
    """Put the streams of Python, NumPy, torch and every CUDA device back on exit."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    # Asking for the devices' streams would initialise CUDA in a run that never uses it.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def untouched(model: Tree) -> Iterator[None]:
    """Restore on exit whatever a loss function may change by calling the model.

    That is: the random streams, train/eval mode, requires_grad, buffers (running statistics),
    and which adapters PEFT has active. Contents are written back only where they changed.
    """
    modes = [(module, module.training) for _, module in model.modules]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters.values()]
    adapters = [
        (vars(module), key, _copied(vars(module)[key]))
        for _, module in model.modules
        for key in ("active_adapter", "_active_adapter", "_disable_adapters")
        if key in vars(module)
    ]
    buffers = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for _, module in model.modules
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    with random_state_restored():
        try:
            yield
        finally:
            for module, training in modes:
                if module.training != training:
                    module.training = training
            for parameter, requires_grad in flags:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
            for attributes, key, value in adapters:
                attributes[key] = value
            for registry, name, buffer, contents in buffers:
                registry[name] = buffer
                # Not every kernel counts a version: batch_norm's running statistics do not.
                if not torch.equal(buffer, contents):
                    with torch.no_grad():
                        buffer.copy_(contents)


@contextlib.contextmanager
def eager(outside: Iterable[nn.Module]) -> Iterator[None]:
    """Run compiled parts as they are written, and keep DDP from reducing gradients.

    A compiled call does not see what is changed for one forward (torch 2.13).

    Args:
        outside: the wrappers around the module, and all modules in it.
    """
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in outside:
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
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters.values()]
    hooks = [
        module.register_forward_hook(_require_input_gradient)
        for _, module in model.modules
        if isinstance(module, nn.Embedding)
    ]
    try:
        for parameter, requires_grad in flags:
            if requires_grad != (id(parameter) in wanted):
                parameter.requires_grad_(not requires_grad)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, requires_grad in flags:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


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


def _require_input_gradient(_module: nn.Module, _args: Any, output: Any) -> Any:
    if not torch.is_grad_enabled() or not isinstance(output, torch.Tensor) or output.requires_grad:
        return output
    # A copy: models may write image features into the embeddings, which autograd forbids on a leaf.
    return output.requires_grad_().clone()


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


@contextlib.contextmanager
def emptied(registry: Any) -> Iterator[None]:
    """Empty a dict in place, for those who hold a reference to it, and fill it again on exit."""
    items = dict(registry)
    registry.clear()
    try:
        yield
    finally:
        registry.update(items)
