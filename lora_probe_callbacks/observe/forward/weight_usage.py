"""See whether a base weight is used by a forward that leaves its adapted layer out.

A layer that is never called may be bypassed (a fused loss multiplies with ``lm_head.weight``,
a kernel takes ``out_proj.weight``), which is a fault, or may have had nothing to do (no image in
the batch, no token for the expert), which is none. Only one of the two reads its base weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext

__all__ = ["PassingMode", "WeightWitness"]

_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class PassingMode(TorchFunctionMode):
    """Passes every torch function through, on one thread, between two moments that no ``with`` block spans.

    Attributes:
        paused: What is called now is not meant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self._open = False

    def open(self) -> None:
        """Begin to watch this thread, unless somebody's mode is active: its end would end ours instead.

        A default device is such a mode too, but it keeps to the bottom of the stack.
        """
        if not self._open and all(isinstance(mode, DeviceContext) for mode in _modes()):
            self._open = True
            self.__enter__()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Stop watching."""
        if self._open:
            self._open = False
            above = []
            while _modes():
                mode = _pop_mode()  # type: ignore[no-untyped-call]
                if mode is self:
                    break
                above.append(mode)
            for mode in reversed(above):
                _push_mode(mode)  # type: ignore[no-untyped-call]


class WeightWitness(PassingMode):
    """Passes every torch function through, and notes which of some tensors it was given.

    It costs a Python call per operation, so it is used for one step, from the forward to the
    optimizer (a loss may be made outside the model), and only when a layer is under suspicion.

    Args:
        weights: Tensor id to the unit whose base weight it is.
    """

    def __init__(self, weights: Mapping[int, int]) -> None:
        super().__init__()
        self._weights = weights
        self._ever_open = False
        self.used: set[int] = set()

    def open(self) -> None:
        """Begin to watch; ``paused`` from the backward to the next forward."""
        super().open()
        self._ever_open |= self._open

    @property
    def seen(self) -> dict[int, bool]:
        """Unit to whether its base weight was used, as far as anybody watched."""
        return {unit: unit in self.used for unit in self._weights.values()} if self._ever_open else {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Reading weight.dtype or weight.device is not using it: only what yields a tensor counts, and not
        # weight.data, through which merging goes.
        if not self.paused and func is not _DATA and isinstance(result, torch.Tensor | tuple | list):
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, torch.Tensor) and id(value) in self._weights:
                    self.used.add(self._weights[id(value)])
        return result


def _modes() -> list[TorchFunctionMode]:
    stack: list[TorchFunctionMode] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return stack
