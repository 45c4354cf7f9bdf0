"""Run a training forward again and leave no trace.

Two questions need it. *Does the forward see the parameters?* (here) One autocast block around several
steps keeps its cache of cast weights, keyed by tensor and not by version, so the forward goes on with
the weights of the first step; a repeat in a nested region without that cache tells
(https://github.com/X-GenGroup/Flow-Factory/issues/186). *Is the gradient right?* (``finite_difference.py``)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lora_probe_callbacks.observe.forward.candidate import tensors_in
from lora_probe_callbacks.observe.model.wrappers import data_parallel, is_compiled, tensor_parallel
from lora_probe_callbacks.restore.module_state import ModuleState
from lora_probe_callbacks.restore.random import RandomState

__all__ = [
    "MOST_BYTES",
    "ForwardRepeat",
    "KeptForward",
]

MOST_BYTES = 256 * 2**20  # of outputs, and of buffers
_HALVES = (torch.bfloat16, torch.float16)


class ForwardRepeat:
    """Runs the first candidate of one step a second time, without autocast's cache.

    Args:
        device: Where the adapter is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stale: tuple[bool, str] | None = None
        self.why_not: str | None = None

    def after(self, kept: KeptForward, output: Any) -> None:
        """Repeat the candidate and compare, once.

        Args:
            kept: The candidate.
            output: What it returned.
        """
        if self.stale is not None or self.why_not is not None:
            return
        if not torch.is_autocast_enabled(self._device.type):
            self.why_not = "the forward was called outside autocast, so no cast weight can be cached around it"
        elif not torch.is_autocast_cache_enabled():
            self.why_not = "autocast runs without its cache, so no cast weight can be stale"
        else:
            self.why_not = kept.why_not()
        if self.why_not is None:
            result: tuple[bool, str] | str
            try:
                result = _compare(kept, output)
            except Exception as error:  # the user's own code: it may count its calls, or need more memory
                result = f"run again, the forward raised {type(error).__name__}: {error}"
            if isinstance(result, str):
                self.why_not = result
            else:
                self.stale = result


class KeptForward:
    """A candidate for a training forward, and what it takes to run it again.

    Args:
        module: The outermost module that was called.
        args: Its arguments; their tensors are kept without their graphs.
        kwargs: Its keyword arguments.
        before: The random state when it began.
        device: Where its parameters are.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: RandomState,
        device: torch.device,
    ) -> None:
        self.module = module
        self._device = device
        self._before = before
        self._args, self._kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        self._inputs = [(t, t._version) for t in tensors_in((args, kwargs)) if not t.is_inference()]
        self._autocast = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))
        self._state: ModuleState | None = None

    def why_not(self) -> str | None:
        """Say why this forward must not be repeated, or None."""
        module, modules = self.module, list(self.module.modules())
        if any(is_compiled(m) for m in modules):
            return "a compiled module is not bit-equal to its eager repeat"
        if data_parallel([module]) is not None or tensor_parallel([module]):
            return "several ranks would have to repeat it together"
        if any(type(m).__name__ == "Linear4bit" and not m.training for m in modules):
            # bitsandbytes 0.50 repacks the weights for inference at a forward in eval mode without input
            # gradients (CPUs with AVX512-BF16), and training forwards then go through a kernel without backward.
            return "a 4-bit model in eval mode is changed by a forward without gradients"
        foreign = next((h for m in modules for h in _hooks(m) if not _of_a_library(h)), None)
        if foreign is not None:
            return f"a forward hook ({getattr(foreign, '__qualname__', type(foreign).__name__)}) would be called twice"
        for value in (*self._args, *self._kwargs.values()):
            if hasattr(value, "get_seq_length") or (value is not None and "Cache" in type(value).__name__):
                return "a cache among the arguments would be written twice"
        if sum(b.numel() * b.element_size() for b in module.buffers()) > MOST_BYTES:
            return "the buffers are too large to be saved and restored"
        return self.changed()

    def changed(self) -> str | None:
        """Say what has been changed since it ran, or None."""
        if any(tensor._version != version for tensor, version in self._inputs):
            return "an argument of the forward was changed in place after it"
        return None

    @contextmanager
    def several(self) -> Iterator[None]:
        """Inside, it may be run many times: the state to come back to is kept once."""
        self._state = ModuleState(self.module)
        try:
            yield
        finally:
            self._state = None

    def run(self) -> list[torch.Tensor]:
        """Run it again without gradients; returns its floating outputs."""
        with self.again(), torch.no_grad():
            return self.call()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, random numbers and precision are those of the forward; all state comes back on exit.

        Without autocast's cache, which may hold the parameters of another time. What there is to warn of,
        the forward itself has said.
        """
        enabled, dtype = self._autocast
        state = self._state or ModuleState(self.module)
        try:
            self._before.put_back()
            with (
                torch.autocast(self._device.type, dtype, enabled=enabled, cache_enabled=False),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                yield
        finally:
            state.put_back()

    def call(self) -> list[torch.Tensor]:
        """The call itself; returns its floating outputs."""
        return [t for t in tensors_in(self.module(*self._args, **self._kwargs)) if t.is_floating_point()]

    def call_until(self, part: nn.Module) -> torch.Tensor:
        """The call up to the moment in which a part of the module begins; returns what that was given."""
        with part.register_forward_pre_hook(_stop):
            try:
                self.module(*self._args, **self._kwargs)
            except _Reached as reached:
                return reached.given
        raise RuntimeError("the output head was not called again")

    def in_sixteen_bits(self) -> bool:
        """Some of it is computed in 16 bits, or less."""
        coarse = self._device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        if coarse or self._autocast[0] or any(p.dtype in _HALVES for p in self.module.parameters()):
            return True
        kinds = ((type(m).__name__, getattr(m, "compute_dtype", None)) for m in self.module.modules())
        return any(name == "Linear8bitLt" or (name == "Linear4bit" and dtype in _HALVES) for name, dtype in kinds)


class _Reached(BaseException):
    """Ends a forward that has come far enough; no code of the model catches it by accident."""

    def __init__(self, given: torch.Tensor) -> None:
        self.given = given


def _stop(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    raise _Reached(args[0])


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


def _compare(kept: KeptForward, output: Any) -> tuple[bool, str] | str:
    """Repeat a forward without autocast's cache and compare the outputs bit by bit.

    Args:
        kept: The training forward.
        output: What it returned.

    Returns:
        (stale, what was compared), or the reason why nothing can be said.
    """
    expected = [t.detach() for t in tensors_in(output) if t.is_floating_point()]
    if not expected:
        return "the forward returned no floating tensor"
    if sum(t.numel() * t.element_size() for t in expected) > MOST_BYTES:
        return "the outputs are larger than 256 MiB"
    first = kept.run()
    if _equal(first, expected):
        return False, f"{len(expected)} outputs bit-equal"
    if not _equal(first, kept.run()):
        return "two repeats of the forward differ from each other: the model is not deterministic"
    largest = max(
        (float((a - b).abs().max()) for a, b in zip(first, expected, strict=False) if a.shape == b.shape), default=0.0
    )
    return True, f"outputs differ by up to {largest:.2e}"


def _equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(some, others, strict=True)
    )
