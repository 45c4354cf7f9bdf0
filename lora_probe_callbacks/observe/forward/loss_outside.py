"""How a loss is made of what left the model, recorded so that it can be made again of other outputs.

Where the loss is computed outside the model, what arrives at the outputs is the loss's own work: a fused loss may have
a backward of its own. The operations between the end of the forward and ``backward()`` are noted with what they were
given, and repeated without gradients. What the loop takes for a constant (detached, made under no_grad) stays one.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_probe_callbacks.observe.forward.weight_usage import PassingMode

__all__ = ["LossTape", "may_record"]

_OPERATIONS = 2000  # a loss of more than that is a model


@dataclass(frozen=True, slots=True)
class _Made:
    """Stands for a tensor that is made of the outputs."""

    number: int


@dataclass(eq=False, slots=True)
class _Operation:
    """One call: its arguments, the tensors that it returned, and the autocast that it ran under."""

    function: Callable[..., Any]
    given: list[Any]
    form: Any
    results: list[int | None]
    autocast: tuple[str, bool, torch.dtype]


def may_record() -> bool:
    """Nothing in this process is compiled: dynamo would trace what records, and compile something else."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is None or not dynamo.counters["frames"]["total"]


class LossTape(PassingMode):
    """Records on this thread, from the end of a forward to ``backward()``.

    Attributes:
        why_not: Why the loss cannot be made again, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.why_not: str | None = None
        self._loss = torch.zeros(())
        self._outputs: list[_Made] = []
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], _Made]] = {}
        self._count = 0
        self._operations: list[_Operation] = []
        self._root: _Made | None = None

    def starts_from(self, outputs: Sequence[torch.Tensor]) -> None:
        """A forward has returned these; several forwards may make one loss."""
        self._outputs += [self._note(tensor) for tensor in outputs]
        self.paused = False
        self.open()

    @property
    def complete(self) -> bool:
        """The loss that was differentiated is made of the outputs, by operations that can be repeated."""
        return self._root is not None and self.why_not is None

    def _note(self, tensor: torch.Tensor) -> _Made:
        made = _Made(self._count)
        self._count += 1
        self._known[id(tensor)] = weakref.ref(tensor), made
        return made

    def _find(self, tensor: torch.Tensor) -> _Made | None:
        """What a tensor was made as, None for a constant; inside an autograd function nothing has a graph."""
        ref, made = self._known.get(id(tensor), (None, None))
        if ref is None or ref() is not tensor:
            return None
        return made if tensor.requires_grad or not torch.is_grad_enabled() else None

    # --- recording --------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused or self._root is not None or self.why_not is not None:
            return func(*args, **kwargs)
        if func is torch.Tensor.backward:
            self._end(args, kwargs)
            return func(*args, **kwargs)  # type: ignore[no-untyped-call]
        leaves, form = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_inference()]
        found = {id(t): made for t in tensors if (made := self._find(t)) is not None}
        versions = [t._version for t in tensors] if found else []
        given = [found.get(id(leaf), leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        result = func(*args, **kwargs)
        if found:
            written = [t for t, version in zip(tensors, versions, strict=True) if t._version != version]
            self._record(func, given, form, result, written, found)
        return result

    def _record(
        self, func: Any, given: list[Any], form: Any, result: Any, written: list[torch.Tensor], found: dict[int, _Made]
    ) -> None:
        if any(id(t) not in found for t in written):
            self.why_not = "the loss writes into tensors of the loop"
        results = tree_flatten(result)[0]
        if not written and not any(isinstance(r, torch.Tensor) for r in results):
            return
        if len(self._operations) == _OPERATIONS:
            self.why_not = f"the loss takes more than {_OPERATIONS} operations"
            self._operations.clear()
            return
        numbers = [self._note(r).number if isinstance(r, torch.Tensor) else None for r in results]
        device = next((g.device.type for g in (*results, *written) if isinstance(g, torch.Tensor)), "cpu")
        autocast = device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self._operations.append(_Operation(func, given, form, numbers, autocast))

    def _end(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        loss = args[0]
        self._root = self._find(loss)
        if self._root is None or loss.numel() != 1 or len(args) > 1 or kwargs.get("gradient") is not None:
            self.why_not = "the loss is not made of the outputs by operations that can be repeated"
        else:
            self._loss = loss.detach().clone()

    # --- again ------------------------------------------------------------------------------

    def was(self) -> float:
        """The value of the loss that was differentiated."""
        return float(self._loss)

    @torch.no_grad()
    def again(self, outputs: Sequence[torch.Tensor | None]) -> float:
        """Make the loss of other outputs.

        Args:
            outputs: In the order in which they came; None for one that received no gradient.

        Returns:
            Its value.
        """
        made = {o.number: v.clone() for o, v in zip(self._outputs, outputs, strict=True) if v is not None}
        for one in self._operations:
            if any(isinstance(g, _Made) and g.number not in made for g in one.given):
                continue  # made of what received no gradient
            args, kwargs = tree_unflatten([made[g.number] if isinstance(g, _Made) else g for g in one.given], one.form)
            device, enabled, dtype = one.autocast
            with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
                results = tree_flatten(one.function(*args, **kwargs))[0]
            made |= {n: r for n, r in zip(one.results, results, strict=True) if n is not None}
        assert self._root is not None
        return float(made[self._root.number])

    def forget(self) -> None:
        """Stop recording and let go of all tensors."""
        self.close()
        self._operations.clear()
        self._known.clear()
