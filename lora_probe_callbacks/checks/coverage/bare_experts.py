"""LP606: fused expert weights without an adapter."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, ok, pending, some, warn
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for expert weights that the requested projections meant and no adapter wraps."""
    if facts.coverage is None:
        return pending("no training forward has begun")
    # LP601 says it where an expected name is missing; where all are there, that settles it.
    experts = facts.coverage.experts if not facts.coverage.expected else ()
    if not experts:
        return ok()
    return warn(
        f"{len(experts)} fused expert weights carry no adapter, although their projections are in target_modules: {some(experts)}",
        cause="experts",
        got=f"0 of {len(experts)} fused expert weights adapted",
        expected="an adapter on each, or a target_modules that does not name them",
        fix=f"experts are parameters, not modules: pass target_parameters=[{experts[0].rpartition('.')[2]!r}, ...]; if only attention and shared "
        "experts are meant, declare expect_targets=(...), which settles it",
    )


CHECK = Check(
    code="LP606",
    name="bare-experts",
    what="The model holds expert weights as parameters of three dimensions, target_modules names their projections, and no adapter wraps them. "
    "It warns.",
    why="target_modules sees modules alone. Attention and the shared expert get adapters, so PEFT does not raise, and most of the model stays "
    "as it is.",
    fix="Name the parameters in target_parameters.",
    quiet="Attention-only adapters; model classes for which PEFT turns the names into target_parameters; experts that are lists of linear layers.",
    threads=("huggingface/peft#3009", "huggingface/peft#2545", "unslothai/unsloth#6936"),
    needs=("coverage",),
    judge=judge,
)
