"""Tokens to compare on: of a user's prompts, or any."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from lora_probe_callbacks.serving.errors import CannotCompareError
from lora_probe_callbacks.serving.scoring import Rows, as_rows

__all__ = ["read_prompts", "synthetic"]

_SEQUENCES, _TOKENS = 32, 64
_LONGEST = 512


def read_prompts(path: Path, base: str) -> Rows:
    """The prompts of a file.

    Args:
        path: One a line: a text, or token ids as a JSON list.
        base: The base model, whose tokenizer turns texts into tokens.

    Returns:
        Token ids, 512 of each at most.

    Raises:
        CannotCompareError: If the file cannot be read, holds nothing, or the base has no tokenizer.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CannotCompareError(f"got --prompts {path}, which cannot be read: {type(error).__name__}") from None
    if not lines:
        raise CannotCompareError(f"got --prompts {path}, which is empty, expected one prompt a line")
    if all(line.startswith("[") and line.endswith("]") for line in lines):
        try:
            return as_rows([json.loads(line)[:_LONGEST] for line in lines])
        except ValueError:
            raise CannotCompareError(f"got --prompts {path} with lists that are no JSON, expected [1, 5, 7]") from None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except Exception as error:
        raise CannotCompareError(
            f"got texts in {path}, and {base} has no tokenizer ({type(error).__name__}): give token ids, [1, 5, 7]"
        ) from None
    rows = [tokenizer(line)["input_ids"][:_LONGEST] for line in lines]
    return as_rows([row for row in rows if len(row) > 1])


def synthetic(model: nn.Module) -> Rows:
    """Tokens of no meaning, the same every time: an adapter changes their log-probs as well."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    return as_rows(torch.randint(0, embedding.weight.shape[0], (_SEQUENCES, _TOKENS), generator=generator))
