"""What the examples of a step are called, and what they say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lora_probe_callbacks.estimators._step_layers import Grouping
from lora_probe_callbacks.estimators._step_recorder import Pass

Identities = str | Callable[[tuple[Any, ...], Mapping[str, Any]], Sequence[Any]]


def groups_of(now: Pass) -> Grouping:
    """Return which positions of a pass are of which example; known once a gradient has arrived."""
    assert now.groups is not None
    return now.groups


def called(ids: Identities | None, passes: Sequence[Pass]) -> list[Any]:
    """Return the names of all examples, in the order of the passes.

    Args:
        ids: How they are called, see `per_example_scores`.
        passes: Forwards.

    Returns:
        A name for each.

    Raises:
        ValueError: If there are not as many.
    """
    if ids == "content_or_number":
        ids = "content" if all(_tokens(now) is not None for now in passes) else None
    if ids is None:
        return list(range(sum(groups_of(now).count for now in passes)))
    names: list[Any] = []
    for now in passes:
        mine = _called_in(ids, now)
        if len(mine) != groups_of(now).count:
            raise ValueError(f"ids got {len(mine)} names for {groups_of(now).count} examples of a forward")
        names += mine
    return names


def _called_in(ids: Identities, now: Pass) -> list[Any]:
    if not isinstance(ids, str):
        return list(ids(now.args, now.kwargs))
    arguments = arguments_of(now)
    if ids != "content":
        if ids not in arguments:
            raise ValueError(f"ids got {ids!r}, expected an argument of the forward, such as {list(arguments)[:4]}")
        column = arguments[ids]
        return list(column.tolist() if isinstance(column, torch.Tensor) else column)
    tokens = _tokens(now)
    if tokens is None:
        raise ValueError("ids='content' needs input_ids among the arguments of the forward; expected integer tokens")
    return [hashlib.blake2b(row, digest_size=6).hexdigest() for row in token_bytes(tokens, arguments, groups_of(now))]


def _tokens(now: Pass) -> torch.Tensor | None:
    """Return what is taken for the tokens of a forward."""
    values = (arguments_of(now).get("input_ids"), *now.args)
    tokens = [v for v in values if isinstance(v, torch.Tensor) and not v.is_floating_point() and v.dim() == 2]
    return tokens[0] if tokens else None


def arguments_of(now: Pass) -> dict[str, Any]:
    """Return the named arguments of a forward."""
    return {**(now.args[0] if now.args and isinstance(now.args[0], Mapping) else {}), **now.kwargs}


def token_rows(tokens: torch.Tensor, arguments: Mapping[str, Any], groups: Grouping) -> list[list[int]]:
    """Return the tokens of every example, without padding where an attention mask tells.

    Args:
        tokens: [R, T].
        arguments: of the forward.
        groups: which row is of which example.

    Returns:
        Tokens by example.
    """
    mask = arguments.get("attention_mask")
    known = isinstance(mask, torch.Tensor) and mask.shape == tokens.shape
    cells = tokens.reshape(groups.cells, -1).tolist()
    kept = mask.reshape(groups.cells, -1).tolist() if known and isinstance(mask, torch.Tensor) else None
    of = range(groups.cells) if groups.example_of_row is None else groups.example_of_row.flatten().tolist()
    rows: list[list[int]] = [[] for _ in range(groups.count)]
    for number, (example, cell) in enumerate(zip(of, cells, strict=True)):
        rows[example] += cell if kept is None else [t for t, real in zip(cell, kept[number], strict=True) if real]
    return rows


def token_bytes(tokens: torch.Tensor, arguments: Mapping[str, Any], groups: Grouping) -> list[bytes]:
    """Return `token_rows` as bytes."""
    return [
        b"".join(t.to_bytes(8, "little", signed=True) for t in row) for row in token_rows(tokens, arguments, groups)
    ]
