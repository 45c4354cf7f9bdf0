"""Scores of a training step against an ordinary backward: the same forward again, its examples weighted at random."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_probe_callbacks.estimators._backward import backward
from lora_probe_callbacks.estimators._self_check import UntrustedProjectionError, agrees
from lora_probe_callbacks.estimators._step_layers import Directions, Layer
from lora_probe_callbacks.estimators._step_recorder import Pass, in_backward, tensors_of
from lora_probe_callbacks.restore.model import eager, only_trainable, own_gradients, untouched
from lora_probe_callbacks.restore.random import RandomState
from lora_probe_callbacks.restore.tree import Tree


class Rehearsal:
    """Keeps what it takes to run the first forward of a step again, up to a cut, and its backward from there.

    The cut is the body of a transformers model, where all that is looked at is in it (logits are large, and some
    losses never make them); else the outermost module that was called.

    Args:
        model: The unwrapped module and what is in it.
        wrappers: Modules around it.
        layers: What is looked at.
        frames: The modules around all of these, from the outside in.
    """

    def __init__(
        self, model: Tree, wrappers: Sequence[nn.Module], layers: Sequence[Layer], frames: Sequence[nn.Module]
    ) -> None:
        self._model, self._wrappers = model, wrappers
        self._parameters = {id(p): p for layer in layers for p in layer.parameters}
        # By the class: PEFT's modules pass on what they lack.
        bodies = [m for m in frames if hasattr(type(m), "config_class") and m.base_model is m]
        self._cut = bodies[0] if bodies else None
        self._outermost: nn.Module | None = None
        self._random: RandomState | None = None
        self._autocast: tuple[str, bool, torch.dtype] | None = None
        self._outputs: list[tuple[torch.Size, float]] = []
        self._cotangents: dict[int, torch.Tensor] = {}
        self._beside: list[str] = []  # outputs of which a part of the loss was made, beside these
        self._handles = [
            *(module.register_forward_pre_hook(self.enter) for module in frames),
            *(module.register_forward_hook(self._leave) for module in frames),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """A frame begins to run."""
        if self._outermost is None and torch.is_grad_enabled() and not in_backward():
            self._outermost = module
            self._random = RandomState()
            kind = next(iter(self._parameters.values())).device.type
            self._autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        cut = self._cut or self._outermost
        if module is not cut or self._outputs or not torch.is_grad_enabled() or in_backward():
            return
        for number, tensor in enumerate(_cut_tensors(output)):
            self._outputs.append((tensor.shape, _size(tensor)))
            keep = functools.partial(self._cotangents.__setitem__, number)
            tensor.register_hook(keep)  # type: ignore[no-untyped-call]
        routed = output.get("router_logits") if isinstance(output, Mapping) else None
        for tensor in tensors_of(routed):
            tensor.register_hook(lambda _: self._beside.append("router_logits"))  # type: ignore[no-untyped-call]

    # --- again ------------------------------------------------------------------------------

    def check(self, now: Pass, directions: Directions, s: torch.Tensor | None) -> str | None:
        """Compare a pass with an ordinary backward.

        Args:
            now: The first pass.
            directions: K of them, by id of the parameter.
            s: Scores, [K, B].

        Returns:
            Why it could not be compared, or None if it agrees.

        Raises:
            UntrustedProjectionError: If it does not.
        """
        groups = now.groups
        if groups is None or now.module is None or self._random is None or self._autocast is None:
            return "no module around all layers was called"
        if hasattr(next(iter(self._parameters.values())), "placements"):
            return "the model is in shards over several ranks"
        moving = list(self._parameters.values())
        by_row = {n: g for n, g in self._cotangents.items() if g.shape[: len(groups.rows)] == groups.rows}
        rest = [str(tuple(g.shape)) for n, g in self._cotangents.items() if n not in by_row] + self._beside[:1]
        if rest or not by_row:
            return f"the loss was made of {', '.join(rest) or 'no output'} of the model, not of rows of examples alone"
        w = torch.randn(groups.count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        weights = [w] if now.squares is None else [w, torch.eye(groups.count, dtype=torch.float64)[0]]
        everywhere = [*self._wrappers, *self._model.modules.values()]
        kind, enabled, dtype = self._autocast
        gradients: list[dict[int, torch.Tensor]] = []
        with contextlib.ExitStack() as undo:
            undo.enter_context(untouched(self._model))
            undo.enter_context(eager(everywhere))
            undo.enter_context(only_trainable(self._model, moving))
            undo.enter_context(own_gradients(moving))
            undo.enter_context(torch.enable_grad())
            self._random.put_back()
            with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):
                outputs = self._again(now)
            for number in by_row:
                if (outputs[number].shape, _size(outputs[number])) != self._outputs[number]:
                    raise UntrustedProjectionError(
                        "the forward is not repeatable: run again with the same random state it gave other outputs, so "
                        "the scores cannot be checked (a cache or a generator of its own, or a step taken "
                        "inside). Pass self_check='never' to go without"
                    )
            for i, vector in enumerate(weights):
                for p in moving:
                    p.grad = None
                total = torch.zeros((), device=moving[0].device)
                for number, g in by_row.items():
                    total = total + (outputs[number] * _weighted(g, vector, groups)).float().sum().to(total.device)
                backward(total, moving, retain_graph=i + 1 < len(weights))
                gradients.append({id(p): p.grad.detach().to_dense().double() for p in moving if p.grad is not None})
        lowest = min(
            {p.dtype for p in self._model.parameters.values() if p.is_floating_point()} | now.dtypes,
            key=lambda d: torch.finfo(d).bits,
        )
        if s is not None:
            for mu, row in zip(directions, s, strict=True):
                expected = sum(float((g * mu[i].to(g)).sum()) for i, g in gradients[0].items() if i in mu)
                agrees(w.to(row), row, expected, _norm(gradients[0]), mu, lowest)
        if now.products is not None:
            found = float(w @ now.products.double().cpu() @ w)
            _same_norm(max(found, 0.0) ** 0.5, _norm(gradients[0]), lowest, float(now.products.diagonal().sum()) ** 0.5)
        if now.squares is not None:
            found = float(now.squares[0]) ** 0.5
            _same_norm(found, _norm(gradients[1]), lowest, float(now.squares.max()) ** 0.5)
        return None

    def _again(self, now: Pass) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not in_backward():
                found.extend(_cut_tensors(output))

        cut = self._cut or now.module
        assert cut is not None
        assert now.module is not None
        handle = cut.register_forward_hook(keep)
        try:
            now.module(*now.args, **now.kwargs)
        finally:
            handle.remove()
        return found


def _cut_tensors(output: Any) -> list[torch.Tensor]:
    """Return tensors that a loss is made of, none of which is made of another: not both logits and loss, no cache."""
    if isinstance(output, Mapping):
        values = [output[name] for name in ("logits", "last_hidden_state") if output.get(name) is not None][:1]
        values = values or list(output.values())
    else:
        values = list(output) if isinstance(output, (tuple, list)) else [output]
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad and v.dim()]
    return tensors if isinstance(output, Mapping) else tensors[:1]


def _weighted(g: torch.Tensor, w: torch.Tensor, groups: Any) -> torch.Tensor:
    """Multiply a cotangent by the weight of the example of each of its rows."""
    by_cell = w if groups.example_of_row is None else w[groups.example_of_row.flatten().cpu()]
    by_cell = by_cell.to(g).view(*groups.rows, *(1 for _ in g.shape[len(groups.rows) :]))
    return g * by_cell


def _norm(gradients: Mapping[int, torch.Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))


def _same_norm(found: float, expected: float, lowest: torch.dtype, scale: float) -> None:
    allowed = 1e-4 if torch.finfo(lowest).bits >= 32 else 5e-2
    if not abs(found - expected) <= allowed * max(expected, scale):
        raise UntrustedProjectionError(
            f"the norm of an example's gradient disagrees with an ordinary backward: got {found:.6g}, expected "
            f"{expected:.6g}. A row of some layer is not the example it was taken for; give example_of_row"
        )


def _size(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().abs().sum())
