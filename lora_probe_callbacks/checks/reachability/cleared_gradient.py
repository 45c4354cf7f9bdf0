"""LP309: gradients are cleared between the backward passes of one step."""

from __future__ import annotations

from itertools import takewhile

from lora_probe_callbacks.checks._base import Check, Verdict, absent, fail, ok, pending, skipped, warn
from lora_probe_callbacks.facts import Accumulation, Facts

# A batch may be thrown away (a loss that is not finite, an overflow): now and then, and not as many each time.
STEPS = 2
PASSES = 4
SAME = 0.98  # cosine between the gradient of the last pass and what is applied: the rest has no part in it


def judge(facts: Facts) -> Verdict:
    """Look for steps that apply the gradient of their last backward passes alone."""
    if not facts.accumulated:
        return pending("no step was seen yet")
    last = facts.accumulated[-1]
    if last.passes < 2:
        return ok() if last.passes else absent("no backward pass left a gradient so far")
    if not last.lost:
        return ok()
    if last.aligned is None or last.aligned < SAME:
        return skipped("something else is applied than what the last backward pass left: a combination made by hand")
    row = list(takewhile(lambda one: _alike(one, last), reversed(facts.accumulated)))
    if len(row) < STEPS or sum(one.lost for one in row) < PASSES:
        return pending(
            f"the gradients of {last.lost} of {last.passes} backward passes were cleared in {len(row)} step(s)"
        )
    message = (
        f"the gradients of {last.lost} of {last.passes} backward passes are cleared before the optimizer has them: "
        "each step applies the rest alone"
    )
    got = f"{last.lost} of {last.passes} passes cleared, in {len(row)} steps in a row"
    expected = f"the sum of {last.passes} passes"
    if last.passes == 2 and facts.accumulation != 2:  # a second loss may reach these tensors and not be meant for them
        fix = "if one of the two losses is not meant for these tensors (a discriminator's) nothing is wrong; else call zero_grad() once a step"
        return warn(message, facts.intended, got=got, expected=expected, fix=fix)
    return fail(message, facts.intended, got=got, expected=expected)


def _alike(one: Accumulation, last: Accumulation) -> bool:
    return (one.passes, one.lost) == (last.passes, last.lost)


CHECK = Check(
    code="LP309",
    name="cleared-gradient",
    what="Gradients of some backward passes of a step are cleared before the optimizer has them, as many in each of several steps.",
    why="zero_grad() before every micro-batch in place of every step: the loss falls, each gradient arrives, and the batch is a fraction of what is "
    "configured, at a fraction of the learning rate.",
    fix="Call zero_grad() once for each optimizer.step(), directly after it or before the first micro-batch.",
    quiet="A batch that is thrown away now and then; weights that are moved between the passes (SAM); two looks at one batch; gradients that are combined "
    "by hand (PCGrad); torch.autograd.grad, which leaves nothing in .grad.",
    threads=(
        "meituan-longcat/LongCat-Image#46",
        "pytorch/torchtitan#3575",
        "bytetriper/RAE#67",
        "huggingface/accelerate#1299",
    ),
    needs=("owned",),
    judge=judge,
)
