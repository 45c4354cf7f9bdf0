"""The variance estimator as it runs inside training: a direction, an E-batch, and the numbers of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from lora_probe_callbacks.estimators._owners import parameters, unwrapped
from lora_probe_callbacks.estimators.batches import PromptBatch
from lora_probe_callbacks.estimators.directions import UpdateDirection
from lora_probe_callbacks.estimators.intervals import skewed_interval, spread
from lora_probe_callbacks.estimators.projections import Backend, project_batches
from lora_probe_callbacks.estimators.variance import conditional_variance, first_order_change
from lora_probe_callbacks.restore.random import random_state_restored

__all__ = ["DirectionName", "Estimate", "VarianceProbe"]

DirectionName = Literal["from_last_step", "from_gradients", "adam_preconditioned", "from_optimizer_step"]


class Estimate(NamedTuple):
    """What one E-batch says of one update direction. All are Python numbers."""

    delta_1: float
    """`scale * mean_n s_n`, the first-order predicted change of the mean loss."""
    standard_error: float
    """Of `delta_1`, over the draw of the prompts of E."""
    conditional_variance: float
    """Its square, `scale^2 * sample_var(s_n) / B_E`."""
    signal_to_noise: float
    """`|delta_1| / standard_error`; nan where both are zero."""
    count: int  # type: ignore[assignment]  # tuple has a method of that name, unused here
    """`B_E`, the prompts."""
    cosine: float
    """Between `mu_X`, the mean gradient of the loss over E, and `mu_Y`, without the scale."""
    lower: float
    """Of the interval of `delta_1` at 95%, `skewed_interval`; minus infinity where the prompts say nothing of it."""
    upper: float
    """Its other end."""
    zeros: float
    """The part of the s_n that is exactly zero."""
    largest: float
    """The part of the spread of s_n that a single prompt makes."""


class VarianceProbe:
    """How much does a step change a quantity on other prompts, to first order, and how sure is that?

    Given as `estimator=` to any front door, it runs directly after the step whose number its cadence
    divides, logs an `Estimate` under `lora_probe/estimator/`, and is itself judged: is the adapter
    active before the forward that makes its losses, on the module that trains, and reached by them?
    Training is left as it was, bit by bit.

    | direction | mu_Y | s_n is taken at the parameters |
    | --- | --- | --- |
    | from_last_step | what the step has added | after the step |
    | from_optimizer_step | the same, as a prediction | before the step |
    | from_gradients | the gradient that the optimizer received | before the step |
    | adam_preconditioned | that in Adam's metric | before the step |

    Each rank of a distributed run estimates from its own prompts.

    Args:
        batches: Where an E-batch comes from, whose prompts must not be those that made the step: a loader,
            one batch each time and from its beginning again at its end; a callable, given the number of
            the step; or a number below 1, that share of the rows of the next training batch, which no
            gradient has seen.
        loss: `loss(model, batch) -> L [B]`, one loss for each prompt in one forward of the model that
            the front door was given, below its wrappers.
        direction: mu_Y.
        every_n_steps: The cadence, from step 0.
        example_of_row: The prompt of each row of a batch, as for `per_prompt_projection`; a `PromptBatch`
            knows it by itself.
        backend: As for `per_prompt_projection`.
        name: What messages call it.

    Raises:
        ValueError: If an argument has a value that cannot be meant.

    Example:
        >>> from lora_probe_callbacks.estimators import nll, sequence_logprobs
        >>> def loss(model, batch):
        ...     return nll(sequence_logprobs(model, batch, adapter="default"), batch)
        >>> probe = VarianceProbe(lambda step: held_out[step], loss, direction="from_last_step", every_n_steps=10)
        >>> probe.due(0), probe.due(5)
        (True, False)
    """

    def __init__(
        self,
        batches: Iterable[Any] | Callable[[int], Any] | float,
        loss: Callable[[nn.Module, Any], torch.Tensor],
        direction: DirectionName = "from_last_step",
        *,
        every_n_steps: int = 50,
        example_of_row: Callable[[Any], torch.Tensor] | None = None,
        backend: Backend = "doubled_rank",
        name: str = "estimator",
    ) -> None:
        if isinstance(batches, int | float) and not 0 < batches < 1:
            raise ValueError(f"batches got {batches!r}, expected a share of the rows between 0 and 1, such as 0.25")
        if not isinstance(batches, int | float | Iterable) and not callable(batches):
            raise ValueError(f"batches got {type(batches).__name__}, expected a loader, a callable or a share")
        if direction not in get_args(DirectionName):
            raise ValueError(f"direction got {direction!r}, expected one of {get_args(DirectionName)}")
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"every_n_steps got {every_n_steps!r}, expected an integer of at least 1")
        if not callable(loss):
            raise ValueError(f"loss got {type(loss).__name__}, expected a callable: loss(model, batch) -> [B]")
        self.batches = batches
        self.loss = loss
        self.direction: DirectionName = direction
        self.every_n_steps = every_n_steps
        self.name = name
        self._example_of_row = example_of_row
        self._backend: Backend = backend
        self._iterator: Iterator[Any] | None = None

    @property
    def share(self) -> float | None:
        """The share of the training batch that it takes, or None if it has batches of its own."""
        return float(self.batches) if isinstance(self.batches, int | float) else None

    @property
    def looks_ahead(self) -> bool:
        """It is taken at the parameters before the step."""
        return self.direction != "from_last_step"

    def due(self, step: int) -> bool:
        """Whether it runs after this step."""
        return step % self.every_n_steps == 0

    def next_batch(self, step: int, device: torch.device) -> Any:
        """Take an E-batch; the random streams stay where they are.

        Args:
            step: The number of the step.
            device: Where its tensors go.

        Returns:
            The batch.

        Raises:
            ValueError: If the loader is empty, or a share was asked for.
        """
        if isinstance(self.batches, int | float):
            raise ValueError("got a share of the training batch, which the training loop hands out: use share_of")
        with random_state_restored():
            if callable(self.batches):
                return _moved(self.batches(step), device)
            if self._iterator is None:
                self._iterator = iter(self.batches)
            batch = next(self._iterator, None)
            if batch is None:
                self._iterator = iter(self.batches)
                batch = next(self._iterator, None)
            if batch is None:
                self._iterator = None
                raise ValueError("the loader of the estimator is empty, expected at least one batch")
        return _moved(batch, device)

    def share_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Take the last rows of a training batch, two at least.

        Args:
            args: Positional arguments of the model's call.
            kwargs: Keyword arguments.

        Returns:
            The arguments cut to these rows: the mapping, the one positional argument, or the tuple.

        Raises:
            ValueError: If there are not two rows.
        """
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim()]
        rows = len(tensors[0]) if tensors else 0
        if rows < 2:
            raise ValueError(f"got a training batch of {rows} rows, expected at least 2: one has no variance")
        keep = max(2, math.ceil((self.share or 0.0) * rows))

        def cut(value: Any) -> Any:
            fits = isinstance(value, torch.Tensor) and value.dim() and len(value) == rows
            return value[-keep:] if fits else value

        if args:
            return cut(args[0]) if len(args) == 1 and not kwargs else tuple(map(cut, args))
        return {name: cut(value) for name, value in kwargs.items()}

    def direction_of(
        self, model: nn.Module, optimizers: Sequence[Optimizer], before: Mapping[str, torch.Tensor]
    ) -> UpdateDirection:
        """Make mu_Y directly after a step, while its gradients are there.

        Args:
            model: The module that is trained.
            optimizers: Those that have stepped it.
            before: Copies of its trainable parameters from before the step.

        Returns:
            The direction.

        Raises:
            ValueError: If the step moved nothing, or its tensors have several optimizers or learning rates
                where one is needed.
        """
        owned = parameters(unwrapped(model))
        last = UpdateDirection.from_last_step(model, before)
        if not any(bool(t.any()) for t in last.tensors.values()):
            raise ValueError("the step moved nothing (skipped, or a learning rate of 0), so it has no direction")
        if self.direction == "from_last_step":
            return last
        if self.direction == "from_optimizer_step":
            return UpdateDirection(last.tensors, scale=1.0, source="from_optimizer_step", model=model)
        ids = {id(p) for p in owned.values() if p.grad is not None}
        rates = {
            (number, float(group["lr"]))
            for number, optimizer in enumerate(optimizers)
            for group in optimizer.param_groups
            if any(id(p) in ids for p in group["params"])
        }
        scaled = any(getattr(optimizer, "grad_scale", None) is not None for optimizer in optimizers)
        if scaled or len({number for number, _ in rates}) != 1:
            raise ValueError(f"{self.direction} needs the unscaled gradients of one optimizer; use from_optimizer_step")
        number, rate = next(iter(rates))
        if self.direction == "adam_preconditioned":
            gradient = UpdateDirection.from_gradients(model, lr=rate)
            return UpdateDirection.adam_preconditioned(gradient, model, optimizers[number], stepped=True)
        if len(rates) != 1:
            raise ValueError(
                f"from_gradients needs one learning rate, got {sorted(r for _, r in rates)}; use from_optimizer_step"
            )
        return UpdateDirection.from_gradients(model, lr=rate)

    def estimate(
        self,
        model: nn.Module,
        direction: UpdateDirection,
        batch: Any,
        *,
        loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    ) -> tuple[Estimate, UpdateDirection]:
        """Compute the numbers of one E-batch; needs neither a callback nor a training loop.

        Args:
            model: The module that is trained.
            direction: mu_Y.
            batch: The E-batch.
            loss: In the place of the loss function, for those who look at what it returns.

        Returns:
            The numbers, and mu_X.
        """
        loss = loss or self.loss

        def losses(module: nn.Module) -> torch.Tensor:
            return loss(module, batch)

        mu_X = UpdateDirection.from_loss(model, losses, lr=1.0)
        rows = self._example_of_row
        if rows is None and isinstance(batch, PromptBatch):
            rows = _rows_of_prompts
        s = project_batches(model, loss, [batch], direction, example_of_row=rows, backend=self._backend)
        delta_1 = float(first_order_change(s, direction.scale))
        variance = float(conditional_variance(s, direction.scale))
        error = math.sqrt(variance)
        lower, upper = skewed_interval(s, direction.scale) if len(s) > 2 else (-math.inf, math.inf)
        tail = spread(s)
        estimate = Estimate(
            delta_1=delta_1,
            standard_error=error,
            conditional_variance=variance,
            signal_to_noise=abs(delta_1) / error if error else math.inf if delta_1 else math.nan,
            count=len(s),
            cosine=mu_X.cosine(direction),
            lower=lower,
            upper=upper,
            zeros=tail.zeros,
            largest=tail.largest,
        )
        return estimate, mu_X


def _rows_of_prompts(batch: PromptBatch) -> torch.Tensor:
    return batch.example_of_row


def _moved(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return type(batch)(_moved(value, device) for value in batch)
    return batch
