"""One look before a long run: a forward, a backward and a rehearsed step, and no trace of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.estimators._trial_step import trial_step
from lora_probe_callbacks.estimators._untouched import random_state_restored
from lora_probe_callbacks.observe.forwards import tensors_in
from lora_probe_callbacks.observe.optimizers import unwrap_optimizer
from lora_probe_callbacks.report.findings import ProbeReport
from lora_probe_callbacks.session import ProbeSession

__all__ = ["preflight"]


def preflight(
    model: nn.Module,
    optimizer: object,
    batch: Any,
    *,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    **intent: Any,
) -> ProbeReport:
    """Run every check that one step can answer, and restore everything bit by bit.

    Weights, gradients, optimizer state, buffers and random streams are afterwards what they were.

    Args:
        model: Whatever is trained.
        optimizer: The optimizer, a wrapper around it, or a list of them.
        batch: One training batch: a mapping is passed as keyword arguments, a tuple or list as
            positional ones, anything else as the one argument.
        loss_fn: ``loss_fn(model, batch) -> scalar``; default: the output's ``loss``, or the output
            itself if it is a scalar.
        **intent: What is meant, see :class:`~lora_probe_callbacks.config.ProbeConfig`; nothing is
            raised, whatever is found.

    Returns:
        The report; ``report.exit_code`` is 0 healthy, 1 unhealthy, 2 could not judge.

    Raises:
        ValueError: If the model holds no adapter, or no loss can be made from its output.
    """
    optimizers = [unwrap_optimizer(o) for o in (optimizer if isinstance(optimizer, list | tuple) else [optimizer])]
    session = ProbeSession(ProbeConfig(**{"verbose": False, **intent, "on_failure": "stop"}))
    with _restored(model, optimizers):
        session.start([("", model)], optimizers)
        try:
            with torch.enable_grad():
                loss = _default_loss(model, batch) if loss_fn is None else loss_fn(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
            session.rehearse(trial_step)
        except Exception as error:
            session.abort(error)
            if not session.report.failures:
                raise
        else:
            session.end()
        finally:
            session.close()
    return session.report


def _default_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, tuple | list):
        output = model(*batch)
    else:
        output = model(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        found = [tuple(t.shape) for t in tensors_in(output)]
        raise ValueError(
            f"got an output with tensors of shapes {found}, expected a scalar or a `loss`: put labels into the batch, "
            "or pass loss_fn=lambda model, batch: ..."
        )
    return loss


@contextmanager
def _restored(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Put gradients, buffers and random streams back; the step itself is rehearsed elsewhere."""
    owned = [t for o in optimizers for g in o.param_groups for t in g["params"]]
    tensors = list({id(t): t for t in (*model.parameters(), *owned)}.values())
    gradients = [t.grad for t in tensors]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    for tensor in tensors:
        tensor.grad = None
    try:
        with random_state_restored():
            yield
    finally:
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)
