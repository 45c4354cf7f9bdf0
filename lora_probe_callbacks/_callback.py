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

    def watch_rollout(self, tokens: object, log_probs: object, *, temperature: float = 1.0, top_p: float = 1.0) -> None:
        """Look at what a sampler has sampled, before the policy is updated on it, see :meth:`Rollouts.watch`.

        Args:
            tokens: Token ids of whole sequences, prompts included and without padding.
            log_probs: The sampler's, of the last tokens of each sequence, in nats.
            temperature: That of sampling.
            top_p: Likewise.
        """
        if self._session is not None:
            self._session.rollouts.watch(tokens, log_probs, temperature=temperature, top_p=top_p)

    def check_saved(self, path: str | os.PathLike[str]) -> ProbeReport:
        """Read a saved file back and compare it with the adapter, see :meth:`RunFiles.check`.

        Args:
            path: A folder or file of an adapter, or a checkpoint. Also after training has ended.

        Returns:
            What was found in this file.
        """
        return (self._session or ProbeSession(self._config)).files.check(path)
