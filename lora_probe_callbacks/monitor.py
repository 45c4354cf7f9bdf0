"""LoraProbeMonitor: the front door for Accelerate and plain loops.

A context manager around a loop that does not change by a line: forwards, gradients and steps are
observed through torch's own hooks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeGuard

import torch
from torch import nn

from lora_probe_callbacks.config import ProbeConfig
from lora_probe_callbacks.engine.session import ProbeSession
from lora_probe_callbacks.report.report import ProbeReport

__all__ = ["LoraProbeMonitor"]


class LoraProbeMonitor:
    """Proves, while a loop runs, that the LoRA adapter is active, reached, owned, moved and seen.

    Args:
        model: Whatever the loop calls: a PeftModel, a wrapper around one, a prepared or compiled
            module; or a list of models (policy and value).
        optimizer: The optimizer, a wrapper around it, or a list of them.
        accelerator: An ``accelerate.Accelerator``: logs through ``accelerator.log`` and, under
            ``on_failure="stop"``, sets its trigger for ``accelerator.check_trigger()``.
        scaler: The ``GradScaler`` of the loop, if it has one.
        log: Receives (metrics, step); replaces the accelerator's.
        **intent: What is meant and when to look, see :class:`~lora_probe_callbacks.config.ProbeConfig`.

    Raises:
        TypeError: If something else than a module, or than an optimizer, stands in its place.
        ValueError: For an argument that cannot be meant; on entering, if the model holds no
            adapter, or not the one that was named.
        LoraProbeError: Inside the loop, at the step at which something fails, unless ``on_failure``
            is ``"stop"`` or ``"warn"``.

    Example::

        with LoraProbeMonitor(model, optimizer) as probe:
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        print(probe.report)
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: object,
        *,
        accelerator: Any = None,
        scaler: torch.amp.GradScaler | None = None,
        log: Callable[[dict[str, float], int], None] | None = None,
        **intent: Any,
    ) -> None:
        self._models = [model] if isinstance(model, nn.Module) else list(model) if _several(model) else []
        self._optimizers = list(optimizer) if _several(optimizer) else [optimizer]
        if not self._models or not all(isinstance(m, nn.Module) for m in self._models):
            raise TypeError(f"model got {_kinds(model)}, expected a torch.nn.Module or a list of at least one")
        if not self._optimizers:
            raise ValueError("optimizer got an empty list, expected at least one")
        self._accelerator = accelerator
        self._scaler = scaler if scaler is not None else getattr(accelerator, "scaler", None)
        if log is None and accelerator is not None:
            log = _accelerator_log(accelerator)
        main = accelerator is None or accelerator.is_main_process
        self._session = ProbeSession(ProbeConfig(**intent), log=log, main_rank=main, on_stop=self._stop)
        self._entered = False
        self._saves: Any = None

    @property
    def report(self) -> ProbeReport:
        """What was found so far; stays after the context has ended."""
        return self._session.report

    @property
    def should_stop(self) -> bool:
        """Something failed under ``on_failure="stop"``: leave the loop."""
        return self._session.should_stop

    def watch(self, value: object, *, name: str = "S", direction: object = None) -> None:
        """Look at an estimator of your own in this step, see :meth:`ProbeSession.watch`.

        Args:
            value: What it differentiates, a tensor with a graph; or the gradients of its loss.
            name: What messages call it.
            direction: The update direction that it is projected on.
        """
        self._session.watch(value, name=name, direction=direction)

    def watch_rollout(self, tokens: object, log_probs: object, *, temperature: float = 1.0, top_p: float = 1.0) -> None:
        """Look at what a sampler has sampled, before the policy is updated on it, see :meth:`Rollouts.watch`.

        Args:
            tokens: Token ids of whole sequences, prompts included and without padding.
            log_probs: The sampler's, of the last tokens of each sequence, in nats.
            temperature: That of sampling.
            top_p: Likewise.
        """
        self._session.rollouts.watch(tokens, log_probs, temperature=temperature, top_p=top_p)

    def check_saved(self, path: str | os.PathLike[str]) -> ProbeReport:
        """Read a saved file back and compare it with the adapter, see :meth:`RunFiles.check`.

        Args:
            path: A folder or file of an adapter, or a checkpoint. Also after the context has ended.

        Returns:
            What was found in this file.
        """
        return self._session.files.check(path)

    def state_dict(self) -> dict[str, Any]:
        """What tells a later run whether it goes on from this one.

        Under Accelerate: ``accelerator.register_for_checkpointing(probe)``.

        Returns:
            Plain values, for a checkpoint.
        """
        return self._session.files.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of the run that is continued: the adapter and the optimizer must be what they were.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self._session.files.load_state_dict(state, whole=self._accelerator is not None)

    def __enter__(self) -> LoraProbeMonitor:
        if self._entered:
            raise RuntimeError("got a monitor that was entered before, expected a new one: make one for each run")
        names = [""] if len(self._models) == 1 else [f"model{i}" for i in range(len(self._models))]
        # Accelerate's default of 1 says nothing: a loop may count by itself.
        accumulation = getattr(self._accelerator, "gradient_accumulation_steps", 1)
        self._session.start(
            zip(names, self._models, strict=True),
            self._optimizers,
            scaler=self._scaler,
            accumulation=accumulation if accumulation > 1 else None,
        )
        self._entered = True
        if self._accelerator is not None:
            self._saves = self._accelerator.register_save_state_pre_hook(self._announce)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saves is not None:
            self._saves.remove()
        if error is None:
            self._session.end()
        else:
            self._session.abort(error)

    def _announce(self, models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        self._session.files.announced(folder)

    def _stop(self) -> None:
        if self._accelerator is not None:
            self._accelerator.set_trigger()


def _several(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _kinds(value: object) -> str:
    return f"[{', '.join(type(v).__name__ for v in value)}]" if _several(value) else type(value).__name__


def _accelerator_log(accelerator: Any) -> Callable[[dict[str, float], int], None]:
    return lambda metrics, step: accelerator.log(metrics, step=step)
