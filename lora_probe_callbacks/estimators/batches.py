"""Padded batches of prompts and their sampled responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Tokens = Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """B prompts with G responses each, every row laid out as `[left pad][prompt][response][right pad]`.

    All prompts end, and all responses start, at one index. What is padding is told by the masks alone:
    the padding token is often the end-of-sequence token, which is a real token of a response.
    The shapes and the layout are checked on construction, with a `ValueError` that names the rows.

    Args:
        sequences: Token ids, `[B, G, T]`, integer.
        attention_mask: True on prompt and response, `[B, G, T]`, bool.
        prompt_boundary: Index of the first response token in every row, between 1 and T - 1.
        response_mask: True on the response tokens that count, `[B, G, T]`, bool. May have holes
            (the output of a tool inside a response); may not reach outside the attention mask.
        max_lengths: `L_max`, the length in tokens that a response to each prompt is normalised by, `[B]`.
            In Dr. GRPO (Liu et al. 2025, arXiv:2503.20783) it is the generation budget.
        advantages: `A`, one number per response, `[B, G]`; None where no policy gradient is taken.

    Example:
        >>> batch = PromptBatch.from_ragged([[5, 6], [7]], [[[1], [2, 3]], [[4, 2], [2]]], pad_id=0)
        >>> batch.sequences[1].tolist()
        [[0, 7, 4, 2], [0, 7, 2, 0]]
        >>> batch.response_lengths.tolist()
        [[1, 2], [2, 1]]
    """

    sequences: Tensor
    attention_mask: Tensor
    prompt_boundary: int
    response_mask: Tensor
    max_lengths: Tensor
    advantages: Tensor | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_layout(self)

    @classmethod
    def from_ragged(
        cls,
        prompts: Sequence[Tokens],
        responses: Sequence[Sequence[Tokens]],
        *,
        pad_id: int,
        advantages: Tensor | Sequence[Sequence[float]] | None = None,
        max_lengths: Tensor | Sequence[int] | int | None = None,
    ) -> PromptBatch:
        """Align ragged token lists; the masks come from the lengths.

        Args:
            prompts: B prompts, each at least one token (a begin-of-sequence token will do): the first
                response token needs something to be predicted from.
            responses: For each prompt its G responses, each at least one token.
            pad_id: What to fill the padding with. May be a token that also occurs in the text.
            advantages: `[B, G]`, or None.
            max_lengths: `L_max`, one number or `[B]`. Default: each prompt's longest response. That one
                depends on the sample; pass the generation budget where the weight must not.

        Returns:
            The padded batch, on the CPU.

        Raises:
            ValueError: If the lists do not make a B x G grid, or a prompt or response is empty.
        """
        counts = [len(group) for group in responses]
        if not prompts or len(prompts) != len(counts):
            raise ValueError(
                f"got {len(prompts)} prompts and {len(counts)} groups of responses, expected one group of "
                "responses for each of at least one prompt"
            )
        if len(set(counts)) != 1 or counts[0] == 0:
            raise ValueError(
                f"got {counts} responses to the prompts, expected the same number G >= 1 for each: "
                "drop or resample responses"
            )
        prompt_rows = [_tokens(prompt) for prompt in prompts]
        response_rows = [[_tokens(response) for response in group] for group in responses]
        empty_prompts = [b for b, row in enumerate(prompt_rows) if not len(row)]
        empty_responses = [
            (b, g) for b, group in enumerate(response_rows) for g, row in enumerate(group) if not len(row)
        ]
        if empty_prompts or empty_responses:
            raise ValueError(
                f"got empty prompts {empty_prompts[:8]} and empty responses (prompt, response) "
                f"{empty_responses[:8]}, expected at least one token in each: drop them, "
                "or keep the end-of-sequence token"
            )
        boundary = max(map(len, prompt_rows))
        shape = (len(counts), counts[0], boundary + max(len(row) for group in response_rows for row in group))
        sequences = torch.full(shape, pad_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.bool)
        for b, (prompt, group) in enumerate(zip(prompt_rows, response_rows, strict=True)):
            for g, response in enumerate(group):
                row = slice(boundary - len(prompt), boundary + len(response))
                sequences[b, g, row] = torch.cat([prompt, response])
                attention_mask[b, g, row] = True
        response_mask = attention_mask & (torch.arange(shape[2]) >= boundary)
        if max_lengths is None:
            max_lengths = response_mask.sum(-1).amax(-1)
        budget = torch.as_tensor(max_lengths)
        return cls(
            sequences=sequences,
            attention_mask=attention_mask,
            prompt_boundary=boundary,
            response_mask=response_mask,
            max_lengths=budget.expand(shape[0]) if budget.ndim == 0 else budget,
            advantages=None if advantages is None else torch.as_tensor(advantages),
        )

    @property
    def num_prompts(self) -> int:
        """`B`."""
        return self.sequences.shape[0]

    @property
    def num_responses(self) -> int:
        """`G`, the responses to each prompt."""
        return self.sequences.shape[1]

    @property
    def response_lengths(self) -> Tensor:
        """`L_response`, the response tokens that count, `[B, G]`."""
        return self.response_mask.sum(-1)

    @property
    def example_of_row(self) -> Tensor:
        """The prompt that each row of the model's `[B * G, T]` input belongs to, `[B * G]`."""
        index = torch.arange(self.num_prompts, device=self.sequences.device)
        return index.repeat_interleave(self.num_responses)

    def to(self, device: torch.device | str) -> PromptBatch:
        """Return the batch with all its tensors on `device`."""
        return replace(
            self,
            sequences=self.sequences.to(device),
            attention_mask=self.attention_mask.to(device),
            response_mask=self.response_mask.to(device),
            max_lengths=self.max_lengths.to(device),
            advantages=None if self.advantages is None else self.advantages.to(device),
        )

    def split(self, prompts_per_batch: int) -> list[PromptBatch]:
        """Cut into micro-batches of whole prompts, the last one possibly smaller.

        Args:
            prompts_per_batch: Most prompts in one micro-batch.

        Returns:
            The micro-batches in order, padded as this batch is (padding never changes a result).

        Raises:
            ValueError: If `prompts_per_batch` is not positive.
        """
        if prompts_per_batch < 1:
            raise ValueError(f"got prompts_per_batch={prompts_per_batch}, expected at least 1")
        parts = [slice(start, start + prompts_per_batch) for start in range(0, self.num_prompts, prompts_per_batch)]
        return [
            replace(
                self,
                sequences=self.sequences[part],
                attention_mask=self.attention_mask[part],
                response_mask=self.response_mask[part],
                max_lengths=self.max_lengths[part],
                advantages=None if self.advantages is None else self.advantages[part],
            )
            for part in parts
        ]


def refuse_shared_prompts(u_batch: PromptBatch, e_batch: PromptBatch) -> None:
    """Refuse a U-batch and an E-batch that have a prompt in common.

    `delta_1 = scale * <X_bar, mu_Y>` is a product of two means. Its expectation is the product of the
    expectations only if the two are independent; a shared prompt adds the covariance of its `X` and `Y`.

    Args:
        u_batch: The prompts that make the update direction.
        e_batch: The prompts whose change is predicted.

    Raises:
        ValueError: If a prompt, compared by its tokens without padding, is in both.
    """
    u_prompts = {prompt: p for p, prompt in enumerate(_prompts(u_batch))}
    shared = [(u_prompts[prompt], n) for n, prompt in enumerate(_prompts(e_batch)) if prompt in u_prompts]
    if shared:
        raise ValueError(
            f"got {len(shared)} prompts in both the U-batch and the E-batch, the first as (index in U, index "
            f"in E) {shared[:8]}, expected none: they bias <X_bar, Y_bar>; draw U and E from disjoint prompts"
        )


def _prompts(batch: PromptBatch) -> list[tuple[int, ...]]:
    tokens = batch.sequences[:, 0, : batch.prompt_boundary].cpu()
    mask = batch.attention_mask[:, 0, : batch.prompt_boundary].cpu()
    return [tuple(row[real].tolist()) for row, real in zip(tokens, mask, strict=True)]


def _tokens(row: Tokens) -> Tensor:
    return torch.as_tensor(row, dtype=torch.long, device="cpu").reshape(-1)


def _check_shapes(batch: PromptBatch) -> None:
    sequences = batch.sequences
    if sequences.ndim != 3 or sequences.is_floating_point() or 0 in sequences.shape:
        raise ValueError(
            f"got sequences of shape {list(sequences.shape)} and dtype {sequences.dtype}, expected integer "
            "token ids [B, G, T], none of them 0 (for one response to each prompt: sequences[:, None])"
        )
    for name, mask in (("attention_mask", batch.attention_mask), ("response_mask", batch.response_mask)):
        if mask.shape != sequences.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"got {name} of shape {list(mask.shape)} and dtype {mask.dtype}, expected "
                f"{list(sequences.shape)} and torch.bool (mask.bool() of a mask of 0 and 1)"
            )
    if not 1 <= batch.prompt_boundary < sequences.shape[2]:
        raise ValueError(
            f"got prompt_boundary={batch.prompt_boundary}, expected 1 to {sequences.shape[2] - 1}: the index "
            "of the first response token, with at least one prompt token before it"
        )
    if batch.max_lengths.shape != sequences.shape[:1] or not bool((batch.max_lengths > 0).all()):
        raise ValueError(
            f"got max_lengths {batch.max_lengths.tolist()}, expected {sequences.shape[0]} positive numbers, "
            "one for each prompt"
        )
    if batch.advantages is not None and batch.advantages.shape != sequences.shape[:2]:
        raise ValueError(
            f"got advantages of shape {list(batch.advantages.shape)}, expected {list(sequences.shape[:2])}: "
            "one for each response, [B, G]"
        )


def _check_layout(batch: PromptBatch) -> None:
    boundary, attended = batch.prompt_boundary, batch.attention_mask
    prompt = attended[..., :boundary]
    response = attended & (torch.arange(attended.shape[2], device=attended.device) >= boundary)
    _refuse_rows(~attended.any(-1), "no attended token (all padding)", "a prompt and a response: drop them")
    _refuse_rows(
        ~prompt[..., -1] | (prompt[..., :-1] & ~prompt[..., 1:]).any(-1),
        f"a prompt that does not run up to prompt_boundary={boundary}",
        "[left pad][prompt][response][right pad]: PromptBatch.from_ragged aligns rows so",
    )
    _refuse_rows(
        (batch.response_mask & ~response).any(-1),
        "response_mask set on the prompt or on padding",
        "it to lie inside the attention mask, from prompt_boundary on",
    )
    _refuse_rows(
        ~batch.response_mask.any(-1),
        "an empty response",
        "at least one response token: drop them, or keep the end-of-sequence token",
    )
    tokens = batch.sequences[..., :boundary]
    _refuse_rows(
        ((tokens != tokens[:, :1]) & prompt).any(-1) | (prompt != prompt[:, :1]).any(-1),
        "another prompt than the first row of their group",
        "the G rows of a group to be responses to one prompt",
    )


def _refuse_rows(bad: Tensor, got: str, expected: str) -> None:
    if bool(bad.any()):
        rows = [tuple(row) for row in bad.nonzero()[:8].tolist()]
        raise ValueError(
            f"got {int(bad.sum())} rows with {got}, the first at (prompt, response) {rows}, expected {expected}"
        )
