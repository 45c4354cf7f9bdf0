"""What the variants come to: problems, notes, one conclusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel

from lora_probe_callbacks.debug.results import OnOff, Projection, VariantResult
from lora_probe_callbacks.observe.model.inventory import Unit

__all__ = ["conclusion", "judge", "lowest_precision"]

# Two ways to one number agree to this, relative to its length: by the lowest precision in the forward.
_AGREE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.2}


def judge(
    units: Sequence[Unit],
    called: set[int],
    on_off: OnOff,
    variants: Sequence[VariantResult],
    projections: Sequence[Projection],
    dtype: torch.dtype,
) -> tuple[list[str], list[str]]:
    """The problems of an adapter, and notes on what could not be judged; ``called`` are indices of units that ran."""
    agree = _AGREE[dtype]
    problems, notes = [], []
    A, B = variants[0], variants[1]
    dead = _dead(A, units, called) or _dead(B, units, called)
    if on_off.verdict == "inactive" and dead:
        problems.append(
            "switching the adapter on changes no logit, whatever its B is: its scaling is 0, its A is zero, or the "
            "forward does not use its layers"
        )
    elif on_off.verdict == "inactive":
        notes.append("switching the adapter on changes no logit yet, but it gets gradients")
    if on_off.verdict == "not-finite":
        problems.append("the logits with the adapter on are not finite: the adapter, or the base, holds inf or nan")
    uncalled = [unit for i, unit in enumerate(units) if i not in called]
    if uncalled:
        notes.append(
            f"{len(uncalled)} of {len(units)} adapted layers did not run on text ({uncalled[0].layer.name}): not judged"
        )
    problems += dead
    if not dead and not _same(A, B, agree):
        problems.append("the gradients through the wrapper (B) are not those through the module (A)")
    for projection in projections:
        error = projection.error_to_loop
        if error is not None and not error <= agree:
            problems.append(
                f"s_n by {projection.backend} is {error:.2g} from the loop (relative), allowed {agree:g} in {dtype}"
            )
    return problems, notes


def _dead(variant: VariantResult, units: Sequence[Unit], called: set[int]) -> list[str]:
    """A layer whose A or B gets a signal trains; with B = 0 it is B, with A = 0 it is A."""
    if variant.backward is not None:
        return [f"variant {variant.variant}: {variant.backward}"]
    by_name = {g.name: g for g in variant.gradients}
    states = [[by_name[slot.name].state for slot in unit.slots] for unit in units]
    bad = [u for u, s in zip(units, states, strict=True) if "not-finite" in s]
    dead = [
        unit
        for i, (unit, s) in enumerate(zip(units, states, strict=True))
        if i in called and "non-zero" not in s and "not-finite" not in s
    ]
    problems = []
    if bad:
        problems.append(
            f"the gradient is not finite in {len(bad)} of {len(units)} layers (variant {variant.variant}; "
            f"{bad[0].layer.name})"
        )
    if dead:
        problems.append(
            f"{len(dead)} of {len(units)} layers get no gradient other than zero although the adapter is active "
            f"(variant {variant.variant}; {dead[0].layer.name})"
        )
    return problems


def _same(A: VariantResult, B: VariantResult, agree: float) -> bool:
    return all(
        a.state == b.state and abs((a.norm or 0) - (b.norm or 0)) <= agree * max(a.norm or 0, b.norm or 0)
        for a, b in zip(A.gradients, B.gradients, strict=True)
    )


def conclusion(problems: Sequence[str], on_off: OnOff, variants: Sequence[VariantResult], tensors: int) -> str:
    """The answer in one paragraph: is it the adapter, or the code around it?"""
    if problems:
        return (
            f"The fault is in the adapter or its base, not in the code around them: {problems[0]}. Make the adapter "
            "anew, or save it again from a healthy run, before looking at the training code."
        )
    reached = variants[0].count("non-zero")
    rest = (
        f"; the other {tensors - reached} are exactly zero because B is still zero, as in every fresh adapter"
        if on_off.verdict == "b-is-zero" and reached < tensors
        else ""
    )
    loud = [v.variant for v in variants[2:] if v.backward is not None]
    silent = [v.variant for v in variants[2:] if v.backward is None]
    told = ""
    if loud:
        told += (
            f" In {' and '.join(loud)} the backward fails here, the lucky case: where anything else is trained "
            "(input gradients for checkpointing, a head), it runs and says nothing."
        )
    if silent:
        told += f" In {' and '.join(silent)} the backward runs without an error and the adapter gets nothing: silent."
    return (
        f"The adapter is sound: active before the forward, S gives {reached} of {tensors} tensors a gradient, through "
        f"the module (A) and through a wrapper (B){rest}. Disabled during the forward (C), or activated after it (D), "
        f"it gets none.{told} So if s_n is zero or a gradient is missing in your own run, look at the order and the "
        "objects in your code: S was computed before set_adapter or inside disable_adapter(), or on another module "
        "than the one that the direction and the optimizer were built on."
    )


def lowest_precision(model: PeftModel) -> torch.dtype:
    """The type that limits how well two ways to one number agree; quantised layers count as what they compute in."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for module in model.modules():
        computed = vars(module).get("compute_dtype")
        if isinstance(computed, torch.dtype):
            types.add(computed)
    return min(types & set(_AGREE), key=lambda d: (torch.finfo(d).bits, -torch.finfo(d).eps))
