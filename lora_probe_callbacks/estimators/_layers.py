"""How each kind of layer runs at theta + eps_n * mu: its forward for one projection.

A plan is made before anything runs; a layer that no rule fits is refused there, by name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lora_probe_callbacks.estimators._per_example import Affine, PerExample, along, narrow_to_wide, wide_to_narrow
from lora_probe_callbacks.restore.tree import Tree

Forward = Callable[..., Any]
Tensors = Mapping[str, torch.Tensor]

# PEFT's variants whose forward is lora_B(lora_A(dropout(x))), or DoRA's around it (peft 0.21).
# The others mix examples, route them, or replace the gradient.
_KNOWN_VARIANTS = {
    "DoraLinearVariant",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "MiCALinearVariant",
    "MiCAEmbeddingVariant",
}


class Change(NamedTuple):
    """An attribute of a module to be replaced while a projection runs."""

    module: nn.Module
    attribute: str
    build: Callable[[Forward, PerExample], Forward]
    layer: str | None  # the name to be visited, None if the change serves another layer's


def plan(model: Tree, mu: Mapping[int, torch.Tensor]) -> list[Change]:
    """Choose a rule for every layer that owns a tensor of the direction, or refuse it by name.

    Args:
        model: the unwrapped module and what is in it.
        mu: the direction by id of the parameter.

    Returns:
        What to change, in the order of the modules.
    """
    paths = model.modules
    changes: list[Change] = []
    embeddings: dict[str, dict[tuple[str, str], torch.Tensor]] = {}
    for path, module in paths.items():
        if not module._parameters:
            continue
        tensors = {name: mu[id(p)] for name, p in module._parameters.items() if id(p) in mu}
        if not tensors:
            continue
        layer_path, layer = _refuse_bypassed(path, tensors, paths)
        if isinstance(module, nn.ParameterDict):
            kind = path.rpartition(".")[2]
            if type(layer).__name__ != "Embedding" or not kind.startswith("lora_embedding_"):
                _refuse(path, module, tensors)
            for adapter, tensor in tensors.items():
                embeddings.setdefault(layer_path, {})[kind, adapter] = tensor
            continue
        rule = _rule(path, module, tensors)
        changes.append(Change(module, _forward_attribute(path, module), rule, path))
    for path, factors in embeddings.items():
        attribute = _forward_attribute(path, paths[path])
        changes.append(Change(paths[path], attribute, _lora_embedding(path, paths[path], factors), path))
    # DoRA gets the weight of its norm, which PEFT treats as a constant, by sending the identity
    # through lora_A and lora_B; without a graph these run unchanged (peft 0.21, lora/dora.py).
    dora = (module for module in paths.values() if hasattr(type(module), "get_lora_weight"))
    without_graph = lambda original, _: torch.no_grad()(original)  # noqa: E731
    changes.extend(Change(module, "get_lora_weight", without_graph, None) for module in dora)
    return changes


@contextlib.contextmanager
def applied(changes: list[Change], examples: PerExample) -> Iterator[None]:
    """Run the changed forwards inside; on exit the instances are as before."""
    # In the instances' own dicts: nn.Module's __setattr__ looks into three registries first.
    formers = [vars(change.module).get(change.attribute) for change in changes]
    try:
        for module, attribute, build, _ in changes:
            vars(module)[attribute] = build(getattr(module, attribute), examples)
        yield
    finally:
        for change, former in zip(changes, formers, strict=True):
            if former is None:
                vars(change.module).pop(change.attribute, None)
            else:
                vars(change.module)[change.attribute] = former


def _forward_attribute(path: str, module: nn.Module) -> str:
    """Return where a module's own forward is: accelerate's device hooks move it to `_old_forward`."""
    attributes = vars(module)
    if "_old_forward" in attributes and "_hf_hook" in attributes:
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            raise NotImplementedError(f"{path} is offloaded; load the adapter onto a device")
        return "_old_forward"
    if "forward" in attributes:
        raise NotImplementedError(
            f"the forward of {path} has been replaced on the instance (a patching library); "
            "its formula is unknown here. Use backend='loop'."
        )
    return "forward"


def _rule(path: str, module: nn.Module, mu: Tensors) -> Callable[[Forward, PerExample], Forward]:
    kind: Any = type(module)
    transposed = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"  # GPT-2
    if mu.keys() == {"bias"} and (transposed or isinstance(module, nn.Linear)):
        return _bias(path, mu["bias"])
    if transposed or kind.forward is nn.Linear.forward:
        return _linear(path, module, mu, transposed=transposed)
    normalises = kind.__name__.endswith("Norm") and not list(module.children())
    affine = isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd, nn.GroupNorm, nn.modules.batchnorm._NormBase))
    if affine or normalises or hasattr(kind, "get_lora_weight"):
        return _affine(path, module, mu)
    return _refuse(path, module, mu)


def _linear(path: str, module: nn.Module, mu: Tensors, *, transposed: bool) -> Callable[[Forward, PerExample], Forward]:
    """Return y = W x + b with dy = M x + m, by one product of twice the narrower width."""
    W, M = getattr(module, "weight").detach(), mu["weight"]  # noqa: B009
    if transposed:
        W, M = W.T, M.T
    outputs, inputs = W.shape
    function = wide_to_narrow if outputs <= inputs else narrow_to_wide
    # No closures: the cells of hundreds of layers would set off the garbage collector.
    layer = Affine(W, M, getattr(module, "bias", None), mu.get("bias"))
    return functools.partial(functools.partial, _linear_forward, function, path, layer)


def _linear_forward(
    function: Forward, path: str, layer: Affine, original: Forward, examples: PerExample, x: torch.Tensor, /
) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return original(x)  # type: ignore[no-any-return]
    eps = examples.visit(x, path)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        # What autocast makes of the operands of a linear layer; a custom backward runs without it.
        dtype = torch.get_autocast_dtype(device)
        x, layer = x.to(dtype), layer.to(dtype)
    return function(x, layer, eps)  # type: ignore[no-any-return]


def _bias(path: str, m: torch.Tensor) -> Callable[[Forward, PerExample], Forward]:
    """Return y = ... + b with dy = m, also for a layer whose weight is quantised."""

    def build(original: Forward, examples: PerExample) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            y: torch.Tensor = original(*args, **kwargs)
            if not torch.is_grad_enabled():
                return y
            eps = examples.visit(y, path)
            return along(y, m.to(y.device), eps)

        return forward

    return build


def _affine(path: str, module: nn.Module, mu: Tensors) -> Callable[[Forward, PerExample], Forward]:
    """Return y = f(theta), affine in each p: dy = sum_p c_p (f(p <- mu_p / c_p) - f(p <- 0)).

    The difference removes what does not depend on p (Gemma's norm multiplies by 1 + w), and
    c_p = max |mu_p| keeps a tiny direction from drowning in it.
    """
    scaled = {}
    for attribute, tensor in mu.items():
        like = getattr(module, attribute)
        c = tensor.abs().max().clamp_min(torch.finfo(tensor.dtype).tiny).to(like.device)
        scaled[attribute] = (c, (tensor.to(like.device) / c).to(like.dtype))

    def build(original: Forward, examples: PerExample) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            y: torch.Tensor = original(*args, **kwargs)
            if not torch.is_grad_enabled():
                return y
            eps = examples.visit(y, path)
            dy = torch.zeros((), dtype=y.dtype, device=y.device)
            for attribute, (c, unit) in scaled.items():
                with torch.no_grad(), _swapped(module, attribute) as swap:
                    swap(unit)
                    at_unit = original(*args, **kwargs)
                    swap(torch.zeros_like(unit))
                    dy = dy + c.to(y.dtype) * (at_unit - original(*args, **kwargs))
            return along(y, dy, eps)

        return forward

    return build


def _lora_embedding(
    path: str, module: nn.Module, mu: Mapping[tuple[str, str], torch.Tensor]
) -> Callable[[Forward, PerExample], Forward]:
    """Return PEFT's embedding, y = ... + s B A[ids], with dy = s (B M_A[ids] + M_B A[ids])."""
    layer: Any = module
    adapters = sorted({adapter for _, adapter in mu})

    def derivative(ids: torch.Tensor, adapter: str) -> torch.Tensor:
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        M_A, M_B = mu.get(("lora_embedding_A", adapter)), mu.get(("lora_embedding_B", adapter))
        dy = torch.zeros((), dtype=A.dtype, device=A.device)
        if M_A is not None:
            dy = dy + F.embedding(ids, M_A.to(A).T) @ B.T
        if M_B is not None:
            dy = dy + F.embedding(ids, A.T) @ M_B.to(B).T
        # Gemma's embedding scales its output, and PEFT scales the adapter's with it.
        scale = layer._get_embed_scale()
        dy = torch.mul(dy, layer.scaling[adapter])
        return dy if scale is None else torch.mul(dy, scale.to(dy.dtype))

    def build(original: Forward, examples: PerExample) -> Forward:
        def forward(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            y: torch.Tensor = original(ids, *args, **kwargs)
            running = [a for a in adapters if a in layer.active_adapters]
            if not torch.is_grad_enabled() or layer.disable_adapters or layer.merged or not running:
                return y
            eps = examples.visit(y, path)
            with torch.no_grad():
                dy = torch.stack([derivative(ids, adapter) for adapter in running]).sum(0)
            return along(y, dy, eps)

        return forward

    return build


@contextlib.contextmanager
def _swapped(module: nn.Module, attribute: str) -> Iterator[Callable[[torch.Tensor], None]]:
    registry: dict[str, Any] = module._parameters
    former = registry[attribute]
    try:
        yield lambda tensor: registry.__setitem__(attribute, tensor)
    finally:
        registry[attribute] = former


def _refuse_bypassed(path: str, mu: Tensors, paths: Mapping[str, nn.Module]) -> tuple[str, nn.Module]:
    """Return the PEFT layer around, or the module; refuse what it does not run as it is written."""
    above, _, last = path.rpartition(".")
    while True:
        layer = paths[above]
        if isinstance(layer, nn.MultiheadAttention) or type(layer).__name__ in {
            "MultiheadAttention",
            "ParamWrapper",
        }:
            raise NotImplementedError(
                f"{above} ({type(layer).__name__}) uses the weights of {path} without calling it, so "
                "backend='doubled_rank' cannot follow; use backend='loop'."
            )
        variants = vars(layer).get("lora_variant")
        if variants is not None:
            for adapter in {last, *mu} & variants.keys() if variants else ():
                variant = type(variants[adapter]).__name__
                if variant not in _KNOWN_VARIANTS:
                    raise NotImplementedError(
                        f"{above} has the LoRA variant {variant}, for which backend='doubled_rank' has no "
                        "formula; use backend='loop'."
                    )
            return above, layer
        if not above:
            return path, paths[path]
        above = above.rpartition(".")[0]


def _refuse(path: str, module: nn.Module, mu: Tensors) -> NoReturn:
    raise NotImplementedError(
        f"backend='doubled_rank' has no rule for {', '.join(sorted(mu))} of {path} "
        f"({type(module).__name__}); use backend='loop', or leave it out of the direction."
    )
