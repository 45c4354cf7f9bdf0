"""Per-prompt directional derivatives s_n = <grad L_n, mu>."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import nn

from lora_probe_callbacks.estimators import _self_check
from lora_probe_callbacks.estimators._backends import LossFunction, alpha, loop
from lora_probe_callbacks.estimators._doubled_rank import doubled_rank
from lora_probe_callbacks.estimators._owners import described, unwrapped, wrappers
from lora_probe_callbacks.estimators.directions import UpdateDirection, refuse_unfit
from lora_probe_callbacks.restore.model import eager, holding, untouched
from lora_probe_callbacks.restore.random import random_state_restored
from lora_probe_callbacks.restore.tree import Tree, tree

Direction = UpdateDirection | Mapping[str, torch.Tensor]
Backend = Literal["doubled_rank", "loop", "alpha"]
SelfCheck = Literal["first", "always", "never"]
Batch = TypeVar("Batch")


def per_prompt_projection(
    model: nn.Module,
    loss_fn: LossFunction,
    direction: Direction,
    *,
    example_of_row: torch.Tensor | None = None,
    backend: Backend = "doubled_rank",
    self_check: SelfCheck = "first",
) -> torch.Tensor:
    """s_n = <grad L_n, mu> = d L_n(theta + eps mu) / d eps at 0, for every example n.

    | backend | cost | for |
    | --- | --- | --- |
    | doubled_rank | one forward and one backward, no gradient of a weight | LoRA, DoRA, full layers |
    | loop | one forward and B backwards | any model: the reference |
    | alpha | a double backward | eager attention; a second opinion |

    Nothing is left behind: `.grad`, requires_grad, train/eval mode, buffers, active adapters and
    the random streams are as before, also when loss_fn raises. Dropout draws the masks that
    the next forward will draw again.

    Args:
        model: the module that is trained, or a compiled or data-parallel wrapper around it.
        loss_fn: `loss_fn(model) -> L [B]`, one loss per example, in one forward; it gets the
            module below the wrappers.
        direction: mu, an UpdateDirection of this very module, or tensors by parameter name.
            Its scale is not applied.
        example_of_row: for doubled_rank, the example 0..B-1 of each row of the batch [R], or of
            each token [R, T] if rows are packed; by default rows are examples.
        backend: which of the three.
        self_check: for doubled_rank, when to compare with an ordinary backward: at the "first"
            use of a model, loss function and shape, "always" or "never".

    Returns:
        s [B], detached; float64 for a float64 model, else float32.

    Raises:
        ValueError: if an argument does not fit the model, the losses or the others.
    """
    inside = tree(unwrapped(model))
    mu, largest = _tensors_by_owner(model, inside, direction)
    _refuse_backend(backend)
    if self_check not in {"first", "always", "never"}:
        raise ValueError(f"got self_check={self_check!r}, expected 'first', 'always' or 'never'")
    if torch.is_inference_mode_enabled():
        raise ValueError("inference_mode cannot be undone inside; call it outside of torch.inference_mode()")
    everywhere = [*wrappers(model), *inside.modules.values()]
    with untouched(inside), eager(everywhere), torch.enable_grad():
        if backend == "loop":
            return loop(inside, loss_fn, mu)[0]
        if backend == "alpha":
            return alpha(inside, loss_fn, mu)[0]
        rows = _checked_rows(example_of_row)
        with random_state_restored():
            s, L, lowest = doubled_rank(inside, loss_fn, mu, largest, rows)
        module = inside.root
        shape = (s.numel(), None if rows is None else rows.shape, module.training, len(mu), lowest)
        first = self_check == "first" and _self_check.first_use(module, loss_fn, shape)
        if first or self_check == "always":
            _self_check.check(inside, loss_fn, mu, s, L, lowest)
            _self_check.passed(module, loss_fn, shape)
        return s


def project_batches(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Batch], torch.Tensor],
    batches: Iterable[Batch],
    direction: Direction,
    *,
    example_of_row: Callable[[Batch], torch.Tensor] | None = None,
    backend: Backend = "doubled_rank",
    self_check: SelfCheck = "first",
) -> torch.Tensor:
    """`per_prompt_projection` of several batches, one after another.

    Args:
        model: as there.
        loss_fn: `loss_fn(model, batch) -> L [b]`.
        batches: anything that loss_fn takes.
        direction: as there.
        example_of_row: the rows of a batch, if they are not its examples.
        backend: as there.
        self_check: as there.

    Returns:
        s of all examples, in the order of the batches.

    Raises:
        ValueError: if there are no batches.
    """
    parts = [
        per_prompt_projection(
            model,
            _on_batch(loss_fn, batch),
            direction,
            example_of_row=None if example_of_row is None else example_of_row(batch),
            backend=backend,
            self_check=self_check,
        )
        for batch in batches
    ]
    if not parts:
        raise ValueError("got no batches, expected at least one")
    return torch.cat(parts)


class ProjectionComparison(NamedTuple):
    """One projection, three ways. Errors are relative L2 norms over the examples.

    The finite difference is limited by the precision of the losses: in bfloat16 it says little.
    """

    projected: torch.Tensor
    loop: torch.Tensor
    finite_difference: torch.Tensor
    error_to_loop: float
    error_to_finite_difference: float


def verify_projection(
    model: nn.Module,
    loss_fn: LossFunction,
    direction: Direction,
    *,
    example_of_row: torch.Tensor | None = None,
    backend: Backend = "doubled_rank",
) -> ProjectionComparison:
    """Compare a backend with the loop and with (L(theta + h mu) - L(theta - h mu)) / 2h.

    Args:
        model: as in `per_prompt_projection`.
        loss_fn: as there.
        direction: as there.
        example_of_row: as there.
        backend: the one to verify.

    Returns:
        The three vectors and their distances. The model is left as it was, bit by bit.
    """
    projected = per_prompt_projection(
        model, loss_fn, direction, example_of_row=example_of_row, backend=backend, self_check="never"
    )
    reference = per_prompt_projection(model, loss_fn, direction, backend="loop")
    inside = tree(unwrapped(model))
    difference = _finite_difference(inside, loss_fn, _tensors_by_owner(model, inside, direction)[0])
    return ProjectionComparison(
        projected,
        reference,
        difference,
        _relative_error(projected, reference),
        _relative_error(projected, difference),
    )


def _finite_difference(model: Tree, loss_fn: LossFunction, mu: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return D(h) = (L(theta + h mu) - L(theta - h mu)) / 2h [B], at the best of six steps h.

    Large steps err by the third derivative, small ones by the rounding of L, and neither is known
    beforehand. From h |mu| = |theta| / 100 on, h falls by factors of 4; taken is the D(h) that
    differs least from its successor (after Ridders, 1982, doi:10.1016/S0141-1195(82)80057-0).
    """
    moving = [parameter for parameter in model.parameters.values() if id(parameter) in mu]
    theta = math.sqrt(sum(float(p.detach().double().square().sum()) for p in moving))
    length = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in mu.values()))
    first = (theta or 1.0) / (100 * max(length, sys.float_info.min))
    D = []
    for h in (first / 4**k for k in range(6)):
        ahead, behind = (_moved_losses(model, loss_fn, moving, mu, step) for step in (h, -h))
        D.append((ahead - behind) / (2 * h))
    changes = [float((after - before).norm()) for before, after in itertools.pairwise(D)]
    best: torch.Tensor = D[changes.index(min(changes)) + 1]
    return best


def _moved_losses(
    model: Tree,
    loss_fn: LossFunction,
    moving: list[nn.Parameter],
    mu: Mapping[int, torch.Tensor],
    step: float,
) -> torch.Tensor:
    """Return L(theta + step * mu) [B] in float64, and theta as it was."""
    with untouched(model), torch.no_grad(), contextlib.ExitStack() as undo:
        ahead = [torch.add(parameter, mu[id(parameter)].to(parameter), alpha=step) for parameter in moving]
        undo.callback(torch.clear_autocast_cache)  # it holds casts of the tensors as they were
        undo.enter_context(holding(moving, ahead))
        torch.clear_autocast_cache()
        moved: torch.Tensor = loss_fn(model.root).double()
        return moved


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.double() - expected.double().to(found.device)).norm()
    return float(difference / expected.double().norm().clamp_min(sys.float_info.min))


def _tensors_by_owner(model: nn.Module, inside: Tree, direction: Direction) -> tuple[dict[int, torch.Tensor], float]:
    """Return mu by id of the parameter that it belongs to, without all-zero tensors, and max |mu|."""
    if isinstance(direction, UpdateDirection):
        owners = direction.owned_by(inside)
        tensors: Mapping[str, torch.Tensor] = direction.tensors
    else:
        # A wrapper gives other names to the same parameters.
        owners = inside.names if model is inside.root else inside.names | tree(model).names
        tensors = direction
    # Refuses unknown names, wrong shapes and NaN in the words of a direction.
    largest = refuse_unfit(tensors, owners, described(inside.root))
    # A tensor that does not move adds nothing, and its layer need not run (an unused adapter).
    used = [name for name in tensors if largest[name]] or list(tensors)
    return {id(owners[name]): tensors[name].detach() for name in used}, max(largest.values())


def _refuse_backend(backend: str) -> None:
    if backend == "jvp":
        raise ValueError(
            "backend='jvp' is refused: through bitsandbytes' 4-bit layers forward mode is silently wrong "
            "(zero, or far off), and fused attention lacks it. Use backend='doubled_rank'."
        )
    if backend not in {"doubled_rank", "loop", "alpha"}:
        raise ValueError(f"got backend={backend!r}, expected 'doubled_rank', 'loop' or 'alpha'")


def _checked_rows(example_of_row: torch.Tensor | None) -> torch.Tensor | None:
    if example_of_row is None:
        return None
    rows = torch.as_tensor(example_of_row).cpu()
    if rows.dim() not in {1, 2} or rows.is_floating_point() or not rows.numel() or int(rows.min()) < 0:
        raise ValueError(
            f"got example_of_row of shape {tuple(rows.shape)} and {rows.dtype}, expected the numbers "
            "0..B-1 of the examples, [R] by row or [R, T] by token"
        )
    return rows


def _on_batch(loss_fn: Callable[[nn.Module, Batch], torch.Tensor], batch: Batch) -> Callable[[nn.Module], torch.Tensor]:
    @functools.wraps(loss_fn)
    def loss_of_batch(model: nn.Module) -> torch.Tensor:
        return loss_fn(model, batch)

    return loss_of_batch
