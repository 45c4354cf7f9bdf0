"""One look before a long run: a forward, a backward and a rehearsed step, and no trace of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.engine.session import ProbeSession
from lora_probe_callbacks.estimators._owners import tree
from lora_probe_callbacks.observe.forward.hooks import tensors_in
from lora_probe_callbacks.observe.model.ownership import tensors_of, unwrap_optimizer
from lora_probe_callbacks.report.findings import ProbeReport
from lora_probe_callbacks.restore.model import own_gradients, untouched
from lora_probe_callbacks.restore.optimizer import needs_closure, trial_step

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

    Weights, gradients, optimizer state, buffers, random streams, train mode and active adapters are
    afterwards what they were. A gradient that is zero, or a rate of 0, is judged over several steps
    and therefore pending here.

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
        ValueError: If the model holds no adapter, or no loss can be made from its output. What the
            user's own code raises comes through as well, unless the report says why.
    """
    optimizers = [unwrap_optimizer(o) for o in (optimizer if isinstance(optimizer, list | tuple) else [optimizer])]
    session = ProbeSession(ProbeConfig(**{"verbose": False, **intent, "on_failure": "raise"}))
    with _restored(model, optimizers):
        session.start([("", model)], optimizers)
        try:
            if not model.training:
                model.train()  # as every loop does; dropout and checkpointing depend on it
            with torch.enable_grad():
                loss = _default_loss(model, batch) if loss_fn is None else _scalar(loss_fn(model, batch))
                loss.backward()  # type: ignore[no-untyped-call]
            session.rehearse(_stepped)
            session.end()
        except Exception as error:
            session.abort(error)  # the first decision that fails ends a run, as it would end the training
            if not session.report.failures:
                raise
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


def _scalar(loss: object) -> torch.Tensor:
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss
    kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
    raise ValueError(f"loss_fn returned {kind}, expected a scalar tensor: the loss that training calls backward() on")


@contextmanager
def _restored(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Put back all that a forward and a backward change; the step itself is rehearsed elsewhere."""
    tensors = {id(t): t for t in (*model.parameters(), *tensors_of(optimizers))}
    with untouched(tree(model)), own_gradients(list(tensors.values())):
        yield


@contextmanager
def _stepped(optimizer: Optimizer) -> Iterator[None]:
    if needs_closure(optimizer):  # LBFGS: no step from the gradients at hand, and none is judged
        yield
    else:
        with trial_step(optimizer):
            yield
