"""One look before a long run: a forward, a backward and a rehearsed step, and no trace of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.engine.session import ProbeSession
from lora_probe_callbacks.observe.forward.candidate import tensors_in
from lora_probe_callbacks.observe.model.ownership import tensors_of, unwrap_optimizer
from lora_probe_callbacks.report.report import ProbeReport
from lora_probe_callbacks.restore.model import own_gradients, untouched
from lora_probe_callbacks.restore.optimizer import needs_closure, trial_step
from lora_probe_callbacks.restore.tree import tree

__all__ = ["preflight"]

_STEPS = 3


def preflight(
    model: nn.Module,
    optimizer: object,
    batch: Any,
    *,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    **intent: Any,
) -> ProbeReport:
    """Prove on one batch what a run can prove, and restore everything bit by bit.

    The batch makes three steps, which are taken back: while B is zero the first can move B alone, the second moves A,
    and the third forward sees both. Weights, gradients, optimizer state, buffers, random streams, train mode and
    active adapters are afterwards what they were. A rate of 0 moves nothing, here as in the first steps of a warm-up:
    the report is "unproven" then, and says so.

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
        The report; ``report.exit_code`` is 0 healthy, 1 unhealthy, 2 unproven.

    Raises:
        ValueError: If the model holds no adapter, or no loss can be made from its output. What the
            user's own code raises comes through as well, unless the report says why.
    """
    optimizers = [unwrap_optimizer(o) for o in (optimizer if isinstance(optimizer, list | tuple) else [optimizer])]
    session = ProbeSession(ProbeConfig(**{"verbose": False, **intent, "on_failure": "raise"}))
    with _restored(model, optimizers), ExitStack() as steps:
        session.start([("", model)], optimizers)
        try:
            if not model.training:
                model.train()  # as every loop does; dropout and checkpointing depend on it
            for _ in range(_STEPS):
                for tensor in _all_tensors(model, optimizers):
                    tensor.grad = None
                with torch.enable_grad():
                    loss = _default_loss(model, batch) if loss_fn is None else _scalar(loss_fn(model, batch))
                    loss.backward()  # type: ignore[no-untyped-call]
                session.rehearse(partial(_stepped, steps))
            session.end()
        except Exception as error:
            session.abort(error)  # the first decision that fails ends a run, as it would end the training
            if not session.report.failures:
                raise
        finally:
            session.close()
    for name in sorted({type(o).__name__ for o in optimizers if needs_closure(o)}):
        session.questions.append(f"{name} steps by a closure, which is not rehearsed")
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
    with untouched(tree(model)), own_gradients(_all_tensors(model, optimizers)):
        yield


def _all_tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[torch.Tensor]:
    return list({id(t): t for t in (*model.parameters(), *tensors_of(optimizers))}.values())


def _stepped(steps: ExitStack, optimizer: Optimizer) -> bool:
    """Let an optimizer step; ``steps`` takes it back in the end."""
    if needs_closure(optimizer):  # LBFGS: no step from the gradients at hand, and none is judged
        return False
    steps.enter_context(trial_step(optimizer))
    return True
