"""A few numbers that differ where the tensors of two ranks do."""

from __future__ import annotations

import torch

__all__ = ["rank_sample"]


def rank_sample(roles: list[list[torch.Tensor]], device: torch.device, each: int = 64) -> torch.Tensor:
    """Two projections and the norm of a few elements of every tensor, for each role.

    A norm alone would not do: the first step of Adam moves every element of B by the learning rate, and
    only the signs differ between ranks whose gradients were not reduced.

    Args:
        roles: The tensors of A, of B and the rest, as a rank holds them.
        device: Where to put them together.
        each: Elements taken of each, at most.

    Returns:
        [3 * len(roles)]: for each role `<x, cos>`, `<x, sin>` and `|x|`.
    """
    rows = [torch.zeros(0, device=device)]
    for tensors in roles:
        flat = [t.reshape(-1) for t in tensors]
        few = [f[:: max(1, f.numel() // each)][:each].to(device, torch.float32) for f in flat]
        x = torch.cat([torch.zeros(1, device=device), *few])
        phase = torch.arange(x.numel(), device=device, dtype=torch.float32)
        rows.append(torch.stack([(x * phase.cos()).sum(), (x * phase.sin()).sum(), x.norm()]))
    return torch.cat(rows)
