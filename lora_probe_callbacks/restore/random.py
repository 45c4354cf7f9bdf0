"""The random streams, kept and put back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["RandomState", "random_state_restored"]


class RandomState:
    """The random streams of this moment: of Python, NumPy, torch and every CUDA device.

    Args:
        generators: Further ones, that modules keep for themselves.
    """

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state(legacy=False)
        self._cpu = torch.get_rng_state()
        # Asking for the devices' streams would initialise CUDA in a run that never uses it.
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        self._own = {generator: generator.get_state() for generator in generators}

    def put_back(self) -> None:
        """Go on from there."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        for generator, own in self._own.items():
            generator.set_state(own)


@contextmanager
def random_state_restored() -> Iterator[None]:
    """Put the streams of Python, NumPy, torch and every CUDA device back on exit."""
    state = RandomState()
    try:
        yield
    finally:
        state.put_back()
