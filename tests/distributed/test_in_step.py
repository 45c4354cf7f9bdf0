"""Scores of a step on two ranks, under DDP and FSDP2, against one process on the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.in_step_cases import scored
from support.processes import in_processes
from support.projection_cases import Case, language_case, language_loss, random_direction, relative_error, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_probe_callbacks.estimators import per_example_scores

IDS = (6, 7)


def on_ranks(kind: str, rank: int, world: int) -> dict[str, Any]:
    model: Any = language_case().model
    mu = random_direction(model)
    ids = tokens(*IDS).chunk(world)[rank]
    called: nn.Module = model
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        base = model.get_base_model()
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        called = DistributedDataParallel(model)
    with per_example_scores(called, mu, norms=True, gram=True, ids="content") as scores:
        language_loss(ids)(called).mean().backward()
    whole = scores.gathered()
    return {
        "s": whole.s.tolist(),  # type: ignore[union-attr]
        "norms": whole.norms.tolist(),  # type: ignore[union-attr]
        "gram": whole.gram.nan_to_num(7.0).tolist(),  # type: ignore[union-attr]
        "ids": whole.ids,
        "checked": scores.checked,
        "why": scores.why_unchecked,
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_are_one_process_on_the_joined_batch(kind: str, tmp_path: Path) -> None:
    found = in_processes({kind: lambda rank, world: on_ranks(kind, rank, world)}, 2, tmp_path)[kind]
    case = language_case()
    ids = tokens(*IDS)
    joined = Case(case.model, lambda m: language_loss(ids)(m) / len(ids))
    expected = scored(joined, random_direction(case.model), norms=True, gram=True, ids="content")
    assert expected.s is not None
    assert expected.norms is not None
    assert expected.gram is not None
    for one in found:
        assert isinstance(one, dict), one
        assert relative_error(torch.tensor(one["s"], dtype=torch.float64), expected.s) < 1e-6
        assert relative_error(torch.tensor(one["norms"], dtype=torch.float64), expected.norms) < 1e-6
        gram = torch.tensor(one["gram"], dtype=torch.float64)
        assert relative_error(gram[:3, :3], expected.gram[:3, :3]) < 1e-6
        assert (gram[:3, 3:] == 7.0).all()  # examples of different ranks
        assert one["ids"] == expected.ids
        assert one["checked"] == (kind == "ddp")
        assert (one["why"] is None) == (kind == "ddp")
