"""What the two callbacks have in common: a session that begins with training, and what a user asks of it."""

from __future__ import annotations

import os

from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.engine.session import ProbeSession
from lora_probe_callbacks.report.report import ProbeReport

__all__ = ["Door"]


class Door:
    """A front door whose session is made when training starts."""

    _config: ProbeConfig
    _session: ProbeSession | None

    @property
    def report(self) -> ProbeReport:
        """What was found so far."""
        return ProbeReport() if self._session is None else self._session.report

    def watch(self, value: object, *, name: str = "S", direction: object = None) -> None:
        """Look at an estimator of your own in this step, see :meth:`ProbeSession.watch`.

        Args:
            value: What it differentiates, a tensor with a graph; or the gradients of its loss.
            name: What messages call it.
            direction: The update direction that it is projected on.
        """
        if self._session is not None:
            self._session.watch(value, name=name, direction=direction)

    def check_saved(self, path: str | os.PathLike[str]) -> ProbeReport:
        """Read a saved file back and compare it with the adapter, see :meth:`RunFiles.check`.

        Args:
            path: A folder or file of an adapter, or a checkpoint. Also after training has ended.

        Returns:
            What was found in this file.
        """
        return (self._session or ProbeSession(self._config)).files.check(path)
