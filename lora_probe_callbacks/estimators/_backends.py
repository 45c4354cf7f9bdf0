"""The slower ways to s: a backward per example, and a double backward; and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from lora_probe_callbacks.estimators._backward import backward
from lora_probe_callbacks.restore.model import only_trainable, own_gradients
from lora_probe_callbacks.restore.tree import Tree

LossFunction = Callable[[nn.Module], torch.Tensor]


def precision(model: Tree) -> torch.dtype:
    """Return what s is summed in: float64 in a float64 model, else float32."""
    double = any(parameter.dtype == torch.float64 for parameter in model.parameters.values())
    return torch.float64 if double else torch.float32


def losses(model: Tree, loss_fn: LossFunction) -> torch.Tensor:
    """Call loss_fn with gradients enabled and check what it returns.

    Args:
        model: whose root is handed to loss_fn.
        loss_fn: returns one loss per example.

    Returns:
        L [B].

    Raises:
        ValueError: if that is not one floating vector.
    """
    with torch.enable_grad():
        L = loss_fn(model.root)
    if not isinstance(L, torch.Tensor) or L.dim() != 1 or not L.is_floating_point():
        got = f"shape {tuple(L.shape)} of {L.dtype}" if isinstance(L, torch.Tensor) else type(L).__name__
        raise ValueError(f"loss_fn returned {got}, expected a floating tensor [B]: one loss per example")
    return L


def weighted_sums(
    model: Tree,
    loss_fn: LossFunction,
    mu: Mapping[int, torch.Tensor],
    weights: Iterable[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """<grad sum_n w_n L_n, mu> for one or several w, by one forward and a backward for each.

    Args:
        model: the unwrapped module and what is in it.
        loss_fn: the losses L [B].
        mu: the direction by id of the parameter.
        weights: vectors w [B]; by default the unit vectors, which makes it s.

    Returns:
        The inner products and the norms of the gradients, in the order of the weights, and L.
    """
    moving = [parameter for parameter in model.parameters.values() if id(parameter) in mu]
    dtype = precision(model)
    with only_trainable(model, moving), own_gradients(moving):
        L = losses(model, loss_fn)
        vectors = list(torch.eye(L.numel()) if weights is None else weights)
        products = torch.zeros(len(vectors), dtype=dtype, device=L.device)
        norms = torch.zeros_like(products)
        for i, w in enumerate(vectors):
            for parameter in moving:
                parameter.grad = None
            if L.requires_grad:
                total = (w.to(L) * L).sum() if weights is not None else L[i]
                backward(total, moving, retain_graph=i + 1 < len(vectors))
            for parameter in moving:
                if parameter.grad is not None:
                    g = parameter.grad.detach().to_dense().to(dtype)
                    products[i] += (g * mu[id(parameter)].to(g)).sum().to(L.device)
                    norms[i] += g.square().sum().to(L.device)
        return products, norms.sqrt(), L.detach()


def loop(model: Tree, loss_fn: LossFunction, mu: Mapping[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return s_n = <grad L_n, mu> by its definition, the reference, and L; both [B]."""
    s, _, L = weighted_sums(model, loss_fn, mu)
    return s, L


def alpha(model: Tree, loss_fn: LossFunction, mu: Mapping[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A double backward: s = d<g, mu>/d alpha, with g = d(sum_n alpha_n L_n)/d theta.

    Args:
        model: the unwrapped module and what is in it.
        loss_fn: the losses L [B], twice differentiable.
        mu: the direction by id of the parameter.

    Returns:
        s [B] and L [B], detached.

    Raises:
        NotImplementedError: if the model's attention or checkpointing has no double backward.
        RuntimeError: whatever else the backward raises.
    """
    _refuse_double_backward(model)
    moving = [parameter for parameter in model.parameters.values() if id(parameter) in mu]
    dtype = precision(model)
    with only_trainable(model, moving), own_gradients(moving):
        L = losses(model, loss_fn)
        weights = torch.ones(L.numel(), dtype=L.dtype, device=L.device, requires_grad=True)
        with torch.autocast(L.device.type, enabled=False):
            try:
                gradients = torch.autograd.grad((weights * L).sum(), moving, create_graph=True, allow_unused=True)
                total = torch.zeros((), dtype=dtype, device=L.device)
                for parameter, g in zip(moving, gradients, strict=True):
                    if g is not None:
                        total = total + (g.to(dtype) * mu[id(parameter)].to(g.device, dtype)).sum().to(L.device)
                if not total.requires_grad:
                    return torch.zeros_like(weights, dtype=dtype), L.detach()
                (s,) = torch.autograd.grad(total, weights)
            except RuntimeError as error:
                if "is not implemented" not in str(error) and "use_reentrant" not in str(error):
                    raise
                raise NotImplementedError(
                    f"backend='alpha' needs a double backward, which this model lacks ({error}); "
                    "use backend='doubled_rank'."
                ) from error
    return s.detach().to(dtype), L.detach()


def _refuse_double_backward(model: Tree) -> None:
    """Fused attention and reentrant checkpoints are known by transformers' own settings."""
    switches = torch.backends.cuda
    fused = switches.flash_sdp_enabled() or switches.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]
    for path, module in model.modules.items():
        attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if attention not in {None, "eager"} and (fused or attention != "sdpa"):
            raise NotImplementedError(
                f"{path or type(module).__name__} uses fused attention ({attention}), which has no double "
                "backward, so backend='alpha' cannot run; use backend='doubled_rank', "
                "attn_implementation='eager', or for sdpa a torch.nn.attention.sdpa_kernel(SDPBackend.MATH) "
                "around the call."
            )
        checkpointing = getattr(module, "gradient_checkpointing", False) and module.training
        function = getattr(module, "_gradient_checkpointing_func", None)
        if checkpointing and getattr(function, "keywords", {}).get("use_reentrant"):
            raise NotImplementedError(
                f"{path or type(module).__name__} uses reentrant checkpointing, which allows no "
                "autograd.grad, so backend='alpha' cannot run; use backend='doubled_rank', or enable "
                "checkpointing with {'use_reentrant': False}."
            )
