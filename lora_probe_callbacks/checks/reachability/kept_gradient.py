"""LP310: the gradients of earlier steps are never cleared."""

from __future__ import annotations

from itertools import takewhile

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending
from lora_probe_callbacks.facts import Facts

STEPS = 2


def judge(facts: Facts) -> Verdict:
    """Look for steps that begin with the gradients of the one before."""
    if not facts.accumulated:
        return pending("no step was seen yet")
    last = facts.accumulated[-1]
    if not last.old:
        return ok()
    row = len(list(takewhile(lambda one: one.old > 0, reversed(facts.accumulated))))
    if row < STEPS:
        return pending("the gradients of an earlier step were still there at the first backward pass, in one step")
    return fail(
        f"the gradients of {last.old} adapter tensors are never cleared: each step applies the sum over all steps before it",
        facts.intended,
        got=f"gradients of the step before at the first backward pass, in {row} steps in a row",
        expected="none, or zeros",
    )


CHECK = Check(
    code="LP310",
    name="kept-gradient",
    what="When the first backward pass of a step begins, the gradients are there as the step before has left them, in two steps in a row.",
    why="Without zero_grad() the gradient is the sum over all steps: the loss falls at first, and the direction is ever older.",
    fix="Call zero_grad() after every optimizer.step(), on the optimizer that owns the adapter, or on the model.",
    quiet="Gradients that are written between two steps in any way; what was left before the run began, once; tensors that no backward pass reaches.",
    threads=("meta-pytorch/torchforge#71", "tenstorrent/tt-blacksmith#711"),
    needs=("owned",),
    judge=judge,
)
