"""LP307: the gradient disagrees with a finite difference."""

from __future__ import annotations

import dataclasses
import math

from lora_probe_callbacks.checks.base import Check, Verdict, fail, ok, pending, skipped
from lora_probe_callbacks.observe.facts import Facts, StepResponse

# Healthy central differences over the norm of the gradient: 0.93 to 1.03 in bfloat16, 1.00 in float32.
OFF = 0.15
AGREE = 0.1  # how far two of them may lie apart to be believed, relative to the first if that is below 1
APART = 0.25  # how far the half ahead and the half behind may: rounding in bfloat16 makes up to 0.13
STEPS = 2
SURE = 4  # times what rounding makes of it, that a difference has to be off


def judge(facts: Facts) -> Verdict:
    """Look for two steps whose gradient is not that of the loss."""
    if not facts.responses:
        return pending("no step response was measured yet")
    last = facts.responses[-1]
    if last.why_not is not None:
        return skipped(last.why_not)
    if last.central is None or math.isnan(last.central):
        return skipped("the gradient says that nothing changes along it")
    if not _off(last.central):
        return ok()
    doubt = _doubt(last)
    if doubt is not None:
        return skipped(doubt)
    wrong = [r for r in facts.responses if r.central is not None and _off(r.central) and not _doubt(r)]
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


def _off(ratio: float) -> bool:
    return not abs(ratio - 1) <= OFF


def _doubt(response: StepResponse) -> str | None:
    """Why a difference that is off need not mean a wrong gradient."""
    central, again, own = response.central, response.again, response.own
    if central is None or again is None or not abs(central - again) <= AGREE * min(1.0, abs(central)):
        return "finite differences of two sizes disagree: the forward is not precise enough, or too curved, for them"
    if not abs(central - 1) > SURE * response.noise:
        return "the change along the gradient is too small to be told from rounding"
    if own is None or not _off(own):
        return "the gradient holds more than what left the model through its outputs, such as a penalty on weights or inner activations"
    sides = response.sides
    if sides is None or not abs(sides[0] - sides[1]) <= APART or not all(map(_off, sides)):
        return "ahead and behind, the loss changes by different amounts: it has a kink here (ReLU), and no one gradient"
    return None


CHECK = Check(
    code="LP307",
    name="wrong-gradient",
    what="After a step, the training forward is run again with the adapter moved a little along its gradient and back: the loss must change by what the "
    "gradient says. Done in the first four steps, and rarely after; two steps must disagree by more than 15%, at two distances, and a gradient that is made "
    "anew as well.",
    why="A forward that runs differently when a checkpoint recomputes it gives the right loss and the gradient of another function. Training goes on, worse.",
    fix="Compare the gradients with gradient checkpointing on and off under one seed; with checkpointing, keep preserve_rng_state=True and leave no state "
    "that one forward changes and the next one reads. Without it, look at custom autograd functions, fused kernels, and layers that merge the adapter in "
    "their forward (LoRA of nn.MultiheadAttention applies the one of out_proj twice, and its gradient knows of one; peft 0.21).",
    quiet="DoRA, VeLoRA and tuners other than LoRA, whose gradients approximate by design; kinks of a ReLU; penalties on weights, losses on inner activations, hooks that change gradients, several forwards in a step, clipping, scaling; what cannot be "
    "repeated is skipped with its reason. Small disagreements (dropout of a few percent) stay below what it can tell.",
    threads=("Comfy-Org/ComfyUI#15846", "huggingface/peft#3774"),
    explained_by=("LP308", "LP405"),
    judge=judge,
)
