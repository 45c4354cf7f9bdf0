"""What TRL's trainers keep of a generation: the tokens and the sampler's log-probs of them."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch

__all__ = ["Generations", "Sampled"]


class Sampled(NamedTuple):
    """A generation.

    Attributes:
        tokens: Ids of whole sequences, without padding.
        log_probs: The sampler's, of the tokens that it sampled; NaN for those of tools.
        temperature: That of sampling.
        top_p: Likewise.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    temperature: float
    top_p: float


class Generations:
    """The generations of one trainer, each once.

    GRPO keeps a generation in ``_buffered_inputs``, with ``sampling_per_token_logps`` where vLLM or a rollout function
    has sampled; RLOO keeps no log-probs of the sampler (trl 1.16).
    """

    def __init__(self) -> None:
        self._seen: weakref.ref[torch.Tensor] | None = None

    def new(self, trainer: Any) -> list[dict[str, Any]]:
        """The batches of a generation that was not asked for before, with log-probs of a sampler; else none."""
        batches = getattr(trainer, "_buffered_inputs", None)
        if not isinstance(batches, list) or not batches or not isinstance(batches[0], dict):
            return []
        first = batches[0].get("completion_ids")
        if first is None or (self._seen is not None and self._seen() is first):
            return []
        self._seen = weakref.ref(first)
        known = all(batch.get("sampling_per_token_logps") is not None for batch in batches)
        return batches if known and "pixel_values" not in batches[0] else []

    @staticmethod
    def sampled(trainer: Any, batches: list[dict[str, Any]]) -> Sampled:
        """A generation in plain values.

        Args:
            trainer: It.
            batches: Those of :meth:`new`.

        Returns:
            Its sequences; those of which nothing was sampled, or all is masked, are left out.
        """
        tokens, log_probs = [], []
        for batch in batches:
            mask, completion = batch["completion_mask"].bool(), batch["completion_ids"]
            values = batch["sampling_per_token_logps"].float()
            if batch.get("tool_mask") is not None:
                values = values.masked_fill(~batch["tool_mask"].bool(), torch.nan)
            for prompt, known, ids, kept, row in zip(
                batch["prompt_ids"], batch["prompt_mask"].bool(), completion, mask, values, strict=True
            ):
                if kept.any() and known.any():
                    tokens.append([*prompt[known].tolist(), *ids[kept].tolist()])
                    log_probs.append(row[kept].tolist())
        return Sampled(tokens, log_probs, float(trainer.temperature), float(trainer.args.top_p))
