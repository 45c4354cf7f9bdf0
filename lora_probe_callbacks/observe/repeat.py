"""Run a training forward again and leave no trace: does the forward see the parameters?

One autocast block around several steps keeps its cache of cast weights, keyed by tensor and not by
version, so the forward goes on with the weights of the first step. A repeat in a nested region
without that cache tells (https://github.com/X-GenGroup/Flow-Factory/issues/186).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_probe_callbacks.observe.forwards import tensors_in
from lora_probe_callbacks.observe.wrappers import data_parallel, is_compiled

__all__ = ["ForwardRepeat"]

_MOST_BYTES = 256 * 2**20


class ForwardRepeat:
    """Runs the first candidate of one step a second time.

    Args:
        device: Where the adapter is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._random: _Random | None = None
        self.stale: tuple[bool, str] | None = None
        self.why_not: str | None = None

    def before(self) -> None:
        """Keep the random state with which a candidate begins."""
        if self.stale is None and self.why_not is None:
            self._random = _random_state(self._device)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Repeat the candidate and compare, once."""
        if self._random is None or self.stale is not None or self.why_not is not None:
            return
        self.why_not = _why_not(module, args, kwargs, self._device)
        if self.why_not is None:
            result = _compare(module, args, kwargs, output, self._random, self._device)
            if isinstance(result, str):
                self.why_not = result
            else:
                self.stale = result


@dataclass(frozen=True, slots=True)
class _Random:
    """The generators that a forward may draw from."""

    python: object
    numpy: dict[str, Any]
    cpu: torch.Tensor
    cuda: torch.Tensor | None


def _random_state(device: torch.device) -> _Random:
    return _Random(
        python=random.getstate(),
        numpy=dict(np.random.get_state(legacy=False)),
        cpu=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    )


def _set_random_state(state: _Random, device: torch.device) -> None:
    random.setstate(state.python)  # type: ignore[arg-type]
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda, device)


def _why_not(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> str | None:
    """Say why a forward need not or must not be repeated.

    Args:
        module: The outermost module.
        args: Its arguments.
        kwargs: Its keyword arguments.
        device: Where its parameters are.

    Returns:
        A reason, or None if it may be repeated.
    """
    if not torch.is_autocast_enabled(device.type):
        return "the forward was called outside autocast, so no cast weight can be cached around it"
    if not torch.is_autocast_cache_enabled():
        return "autocast runs without its cache, so no cast weight can be stale"
    if is_compiled(module) or any(is_compiled(m) for m in module.modules()):
        return "a compiled module is not bit-equal to its eager repeat"
    if data_parallel([module]) is not None:
        return "several ranks would have to repeat it together"
    if any(type(m).__name__ == "Linear4bit" and not m.training for m in module.modules()):
        # bitsandbytes 0.50 repacks the weights for inference at a forward in eval mode without input
        # gradients (CPUs with AVX512-BF16), and training forwards then go through a kernel without backward.
        return "a 4-bit model in eval mode is changed by a forward without gradients"
    foreign = next((h for m in module.modules() for h in _hooks(m) if not _of_a_library(h)), None)
    if foreign is not None:
        return f"a forward hook ({getattr(foreign, '__qualname__', type(foreign).__name__)}) would be called twice"
    for value in (*args, *kwargs.values()):
        if hasattr(value, "get_seq_length") or (value is not None and "Cache" in type(value).__name__):
            return "a cache among the arguments would be written twice"
    if sum(b.numel() * b.element_size() for b in module.buffers()) > _MOST_BYTES:
        return "the buffers are too large to be saved and restored"
    return None


def _hooks(module: nn.Module) -> Iterator[object]:
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()


def _of_a_library(hook: object) -> bool:
    """Hooks of these keep nothing; one of the user's may collect what it sees."""
    where = getattr(hook, "__module__", None) or type(hook).__module__
    return where.split(".")[0] in (
        "lora_probe_callbacks",
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "torch",
    )


def _compare(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    before: _Random,
    device: torch.device,
) -> tuple[bool, str] | str:
    """Repeat a forward without autocast's cache and compare the outputs bit by bit.

    Args:
        module: The outermost module of the training forward.
        args: Its arguments.
        kwargs: Its keyword arguments.
        output: What it returned.
        before: The random state when it began.
        device: Where its parameters are.

    Returns:
        (stale, what was compared), or the reason why nothing can be said.
    """
    expected = [t.detach() for t in tensors_in(output) if t.is_floating_point()]
    if not expected:
        return "the forward returned no floating tensor"
    if sum(t.numel() * t.element_size() for t in expected) > _MOST_BYTES:
        return "the outputs are larger than 256 MiB"
    first = _repeat(module, args, kwargs, before, device)
    if _equal(first, expected):
        return False, f"{len(expected)} outputs bit-equal"
    if not _equal(first, _repeat(module, args, kwargs, before, device)):
        return "two repeats of the forward differ from each other: the model is not deterministic"
    largest = max(
        (float((a - b).abs().max()) for a, b in zip(first, expected, strict=False) if a.shape == b.shape), default=0.0
    )
    return True, f"outputs differ by up to {largest:.2e}"


def _repeat(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    before: _Random,
    device: torch.device,
) -> list[torch.Tensor]:
    dtype = torch.get_autocast_dtype(device.type)
    with _restored(module, before, device), torch.no_grad(), torch.autocast(device.type, dtype, cache_enabled=False):
        return [t for t in tensors_in(module(*args, **kwargs)) if t.is_floating_point()]


def _equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(some, others, strict=True)
    )


@contextmanager
def _restored(module: nn.Module, before: _Random, device: torch.device) -> Iterator[None]:
    """Begin with the random state of the first run, and end with all state that it left.

    That is the random state, the buffers, and what the modules keep in their attributes: a router's
    auxiliary loss, a counter, a list of features.
    """
    after = _random_state(device)
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    attributes = [(m.__dict__, {k: (v, _contents(v)) for k, v in m.__dict__.items()}) for m in module.modules()]
    _set_random_state(before, device)
    try:
        yield
    finally:
        _set_random_state(after, device)
        for present, former in attributes:
            for added in present.keys() - former.keys():
                del present[added]
            for key, (value, contents) in former.items():
                present[key] = value
                _put_back(value, contents)
        for buffer, value in buffers:
            # Batch norm writes its statistics without counting it as a change, and saves them for the backward,
            # which a write that counts would break.
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)


def _contents(value: object) -> list[Any] | None:
    if type(value) in (dict, OrderedDict):
        return list(value.items())  # type: ignore[attr-defined]
    return list(value) if type(value) in (list, set) else None  # type: ignore[call-overload]


def _put_back(value: Any, contents: list[Any] | None) -> None:
    now = _contents(value)
    if contents is None or now is None or _same(now, contents):
        return
    value.clear()
    (value.extend if isinstance(value, list) else value.update)(contents)


def _same(some: list[Any], others: list[Any]) -> bool:
    """Whether two contents are the same objects; comparing tensors by value would not give one answer."""
    if len(some) != len(others):
        return False
    return all(
        a is b
        or (isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 2 and a[0] == b[0] and a[1] is b[1])
        for a, b in zip(some, others, strict=True)
    )
