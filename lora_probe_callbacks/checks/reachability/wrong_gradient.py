"""LP307: the gradient disagrees with a finite difference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped
from lora_probe_callbacks.facts import Facts, StepResponse

# Healthy central differences over the norm of the gradient: 1.00 in float32, and 0.5 to 1.05 in 16 bits, where small
# moves are lost to rounding as long as B is about zero; aside from there, 0.9 to 1.05.
OFF = 0.15
AGREE = 0.1  # how far two of them may lie apart to be believed, relative to the first if that is below 1
LEAST = 0.1  # below that nothing is left of the gradient's share so far out
APART = 0.25  # how far the half ahead and the half behind may: rounding in bfloat16 makes up to 0.13
STEPS = 2
SURE = 4  # times what rounding makes of it, that a difference has to be off
PATIENCE = 4  # steps in a row that could not be judged, after which no more are tried


def judge(facts: Facts) -> Verdict:
    """Look for two steps whose gradient is not that of the loss."""
    if not facts.responses:
        return pending("no step response was measured yet")
    last = facts.responses[-1]
    reason = _why_not(last)
    if reason is not None:
        given_up = f" ({PATIENCE} steps in a row: not tried again in this run)" if hopeless(facts.responses) else ""
        return skipped(reason + given_up)
    if not _off(last):
        return ok()
    wrong = [r for r in facts.responses if _off(r) and _why_not(r) is None]
    if len(wrong) < STEPS:
        return pending(f"the gradient disagrees with a finite difference in one step ({last.central:.2f} of it)")
    found = ", ".join(f"{r.central:.2f}" for r in wrong)
    verdict = fail(
        "the gradient is not that of the loss: along it, the loss changes by another amount than it says",
        facts.intended,
        got=f"finite difference over gradient {found} in steps {', '.join(str(r.step) for r in wrong)}",
        expected="1, within rounding",
    )
    return dataclasses.replace(verdict, seen=(last.step, last.framework_step))


def unsettled(response: StepResponse) -> bool:
    """What was measured up to now neither clears the gradient nor makes it impossible to judge."""
    return _off(response) and _why_not(response) is None


def hopeless(responses: Sequence[StepResponse]) -> bool:
    """The last steps could not be judged for one reason, which will hold in the next ones as well."""
    last = responses[-PATIENCE:]
    reasons = {None if r.passing else _why_not(r) for r in last}
    # What follows a colon is of that step alone.
    kinds = {None if reason is None else reason.partition(":")[0] for reason in reasons}
    return len(last) == PATIENCE and len(kinds) == 1 and None not in kinds


def _off(response: StepResponse) -> bool:
    return response.central is not None and _is_off(response.central)


def _is_off(ratio: float) -> bool:
    return not abs(ratio - 1) <= OFF


def _why_not(response: StepResponse) -> str | None:
    """Why a step cannot be judged; what was not measured excludes nothing."""
    central, sides, own, again = response.central, response.sides, response.own, response.again
    if response.why_not is not None:
        return response.why_not
    if central is None or math.isnan(central):
        return "the gradient says that nothing changes along it"
    if not _is_off(central):
        return None
    if sides is not None and not (abs(sides[0] - sides[1]) <= APART and all(map(_is_off, sides))):
        return (
            "ahead and behind, the loss changes by different amounts: it has a kink here (a ReLU, a clamp, a router that switches), or it is "
            "too curved for the distance that precision asks for"
        )
    if own is not None and not _is_off(own):
        return (
            "made anew from the outputs alone and a little aside, the gradient is right: either it holds more than what left "
            "the model, such as a penalty on weights or inner activations, or small moves are lost to rounding"
        )
    if again is not None and (own is None or not (abs(own) > LEAST and abs(own - again) <= AGREE * min(1.0, abs(own)))):
        return "finite differences of two sizes disagree: the forward is not precise enough, or too curved, for them"
    if not abs(central - 1) > SURE * response.noise:
        return "the change along the gradient is too small to be told from rounding"
    return None


CHECK = Check(
    code="LP307",
    name="wrong-gradient",
    what="After a step, the training forward is run again with the adapter moved a little along its gradient and back: the loss must change by what the "
    "gradient says. Done in the first four steps, and rarely after, unless none of the four could be judged for one and the same reason; two steps must "
    "disagree by more than 15%, and so must a gradient that is made anew a little aside, at two distances.",
    why="A forward that runs differently when a checkpoint recomputes it gives the right loss and the gradient of another function. Training goes on, worse.",
    fix="Compare the gradients with gradient checkpointing on and off under one seed; with checkpointing, keep preserve_rng_state=True and leave no state "
    "that one forward changes and the next one reads. Without it, look at custom autograd functions, fused kernels, and layers that merge the adapter in "
    "their forward (LoRA of nn.MultiheadAttention applies the one of out_proj twice, and its gradient knows of one; peft 0.21).",
    quiet="16 bits, in which small moves are lost to rounding as long as B is about zero; DoRA, VeLoRA and tuners other than LoRA, whose gradients approximate by design; kinks of a ReLU; penalties on weights, losses on inner activations, hooks that change gradients, several forwards in a step, clipping, scaling; what cannot be "
    "repeated is skipped with its reason. Small disagreements (dropout of a few percent) stay below what it can tell.",
    threads=("Comfy-Org/ComfyUI#15846", "huggingface/peft#3774"),
    explained_by=("LP308", "LP405"),
    needs=(
        "owned",
        "finite difference",
    ),
    judge=judge,
)
