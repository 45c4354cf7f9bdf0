"""Rows of new tokens: a gradient came to where a token stood; was it still there for the token's row?

A mask or hook on an embedding's gradient that keeps the wrong rows lets the table train and its new rows stand. Both
ends are looked at: the gradient of the embedding's output at the positions of a token, and that of the token's row when
the optimizer has stepped. What came in at the one and is exactly zero at the other was taken away between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from lora_probe_callbacks.facts import Floats, TokenRowsFact
from lora_probe_callbacks.observe.device.transfer import Readout
from lora_probe_callbacks.observe.model.wrappers import is_shard

__all__ = ["TokenRows"]

MOST = 32  # tokens that are looked at: a few rows tell of a mask


class TokenRows:
    """The rows of some tokens in one embedding.

    Args:
        name: The embedding's name.
        table: The embedding, or what wraps it.
        ids: Declared tokens that it knows, of which up to 32 are looked at, evenly spread.
        adapters: The adapters that train.
    """

    def __init__(self, name: str, table: nn.Module, ids: Sequence[int], adapters: set[str]) -> None:
        aside = {m.padding_idx for m in table.modules() if isinstance(m, nn.Embedding)}  # never has a gradient
        kept = [i for i in ids if i not in aside]
        self.name, self.table = name, table
        self.ids = tuple(kept[:: max(1, -(-len(kept) // MOST))])
        self._sources = list(_sources(table, adapters, self.ids)) if self.ids else []
        self._tokens = torch.tensor(self.ids)
        self._arrived: torch.Tensor | None = None  # of each token: positions that got a gradient in this step
        self._occurred: set[int] = set()
        self._row: dict[int, int] = {}  # token to steps in a row in which its row had none
        self._last: tuple[int, int] | None = None

    @property
    def watchable(self) -> bool:
        """There is something to look at."""
        return bool(self.ids and self._sources)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What holds the rows."""
        return [tensor for tensor, _, _ in self._sources]

    def begin(self) -> None:
        """A new step."""
        self._arrived = None

    @torch.no_grad()
    def came(self, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """A gradient has come to the output of the embedding.

        Args:
            ids: Tokens, of any shape.
            gradient: Of that shape, and the width of the embedding.
        """
        if gradient.shape[:-1] != ids.shape:
            return
        self._tokens = self._tokens.to(ids.device)
        here = ids.reshape(-1, 1) == self._tokens
        counts = (here & (gradient != 0).any(-1).reshape(-1, 1)).sum(0)
        self._arrived = counts if self._arrived is None else self._arrived + counts.to(self._arrived.device)

    @torch.no_grad()
    def read(self, readout: Readout) -> tuple[range, range] | None:
        """Directly after a step: put what came, and the size of each row's gradient, into ``readout``."""
        if self._arrived is None:
            return None
        total = None
        for tensor, places, columns in self._sources:
            gradient = tensor.grad
            if gradient is None or gradient.is_sparse:
                return None
            rows = (gradient.T if columns else gradient)[places]
            size = rows.abs().sum(-1, dtype=torch.float32)
            total = size if total is None else total + size.to(total.device)
        return None if total is None else (readout.add(self._arrived), readout.add(total))

    def advance(self, arrived: Floats, sizes: Floats, step: int, framework_step: int) -> None:
        """Take in one step."""
        for token, came, size in zip(self.ids, arrived, sizes, strict=True):
            if came:
                self._occurred.add(token)
                self._row[token] = self._row.get(token, 0) + 1 if size == 0 else 0
        self._last = (step, framework_step)

    def fact(self) -> TokenRowsFact:
        """What the check may know."""
        starved = tuple((token, count) for token, count in self._row.items() if count)
        return TokenRowsFact(self.name, self.ids, len(self._occurred), starved, self._last)


def _sources(
    table: nn.Module, adapters: set[str], ids: Sequence[int]
) -> Iterator[tuple[torch.Tensor, list[int], bool]]:
    """What trains the rows: a tensor, where in it each token stands, and whether tokens are its columns."""
    found: list[tuple[torch.Tensor, list[int], bool]] = []
    for part in table.modules():
        if isinstance(part, TrainableTokensLayer):
            for adapter in adapters & set(part.token_indices):
                known = list(part.token_indices[adapter])
                if all(i in known for i in ids):
                    found.append((part.trainable_tokens_delta[adapter], [known.index(i) for i in ids], False))
        elif isinstance(part, LoraLayer):
            found += [(a, list(ids), True) for n, a in part.lora_embedding_A.items() if n in adapters]
        elif isinstance(part, ModulesToSaveWrapper):
            copies = [part.modules_to_save[a] for a in adapters if a in part.modules_to_save]
            found += [
                (w, list(ids), False) for c in copies if isinstance(w := getattr(c, "weight", None), torch.Tensor)
            ]
        elif isinstance(part, nn.Embedding) and not any(isinstance(m, ModulesToSaveWrapper) for m in table.modules()):
            found.append((part.weight, list(ids), False))
    yield from (f for f in found if f[0].requires_grad and not is_shard(f[0]))
