"""Scores of a training step against their definition: a backward for every example."""

from __future__ import annotations

from typing import Any

import torch
from support.projection_cases import Case, random_direction, relative_error

from lora_probe_callbacks.estimators import ExampleScores, per_example_scores


def by_loop(case: Case) -> dict[str, torch.Tensor]:
    """Every example's gradient: a forward and a backward for each, as reentrant checkpoints allow no other."""
    trained = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    count = len(case.loss_fn(case.model))
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in trained}
    for n in range(count):
        case.model.zero_grad()
        torch.manual_seed(7)
        case.loss_fn(case.model)[n].backward()
        for name, p in trained.items():
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.detach().clone())
    case.model.zero_grad()
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


def scored(case: Case, directions: Any, **options: Any) -> ExampleScores:
    """The scores of one ordinary step on the summed losses."""
    options = {"self_check": "always", **options}
    torch.manual_seed(7)
    with per_example_scores(case.model, directions, **options) as scores:
        case.loss_fn(case.model).sum().backward()
    return scores


def agrees_with_loop(case: Case, tolerance: float, **options: Any) -> None:
    """Scores along two directions, with and without norms, norms and products."""
    gradients = by_loop(case)
    mus = [random_direction(case.model, seed=seed) for seed in (3, 4)]
    expected = torch.stack([_dot(gradients, mu) for mu in mus])
    assert expected.abs().min() > 0
    scores = scored(case, mus, **options)
    assert scores.checked
    assert scores.s is not None
    assert relative_error(scores.s, expected) < tolerance
    if not options.get("per_token"):  # many directions take another way
        case.model.zero_grad()
        many = scored(case, [*mus, *mus[::-1]], **options).s
        assert many is not None
        assert relative_error(many, torch.cat([expected, expected.flip(0)])) < tolerance
    case.model.zero_grad()
    scores = scored(case, mus, norms=True, gram=True, **options)
    assert scores.s is not None
    assert scores.gram is not None
    assert scores.norms is not None
    G = torch.cat([g.flatten(1).double() for g in gradients.values()], 1)
    assert relative_error(scores.s, expected) < tolerance
    assert relative_error(scores.gram, G @ G.T) < 2 * tolerance
    assert relative_error(scores.norms, G.norm(dim=1)) < tolerance
    assert abs(scores.summed[0] / float(G.sum(0).norm()) - 1) < tolerance


def _dot(gradients: dict[str, torch.Tensor], mu: dict[str, torch.Tensor]) -> torch.Tensor:
    parts = [(g.double() * mu[name].double()).flatten(1).sum(1) for name, g in gradients.items()]
    return torch.stack(parts).sum(0)
