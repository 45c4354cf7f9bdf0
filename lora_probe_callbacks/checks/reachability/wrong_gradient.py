"""LP307: the gradient disagrees with a finite difference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped, some
from lora_probe_callbacks.facts import Facts, StepResponse, mask

# Healthy central differences over what the gradient says: 1.00 in float32, and 0.5 to 1.05 in 16 bits, where small
# moves are lost to rounding as long as B is about zero; aside from there, 0.9 to 1.05.
OFF, OFF_16 = 0.02, 0.15
OUTSIDE = 0.1  # of what a random move of the outputs changes
STRAY = 0.002  # the same where the gradient is exactly zero, of the gradient of all tensors
AGREE = 0.1  # how far two of them may lie apart to be believed, relative to the first if that is below 1
LEAST = 0.1  # below that nothing is left of the gradient's share so far out
APART = 0.25  # how far the half ahead and the half behind may: rounding in bfloat16 makes up to 0.13
STEPS = 2
SURE = 4  # times what rounding makes of it, that a difference has to be off
PATIENCE = 4  # steps in a row that could not be judged, after which no more are tried


def judge(facts: Facts) -> Verdict:
    """Look for tensors whose gradient is not that of the loss in two steps."""
    if not facts.responses:
        return pending("no gradient was measured yet")
    last = facts.responses[-1]
    outside = [r for r in facts.responses if _wrong_outside(r)]
    if len(outside) >= STEPS and outside[-1] is last:
        return _fail_outside(facts, outside)
    reason = _why_not(last)
    if reason is not None:
        given_up = f" ({PATIENCE} steps in a row: not tried again in this run)" if hopeless(facts.responses) else ""
        return skipped(reason + given_up)
    if not _off(last):
        return ok()
    if not is_bad(last):
        return skipped("the loss changes by another amount, as in a step before, in which a closer look explained it")
    wrong = _wrong(facts.responses)
    if len(wrong) < STEPS:
        return pending(f"the gradient disagrees with a finite difference in one step ({_said(last)})")
    return _fail(facts, wrong)


def _wrong_outside(response: StepResponse) -> bool:
    off = response.outside
    return off is not None and abs(off) > max(OUTSIDE, SURE * response.outside_noise)


def _fail_outside(facts: Facts, wrong: list[StepResponse]) -> Verdict:
    verdict = fail(
        "the loss is made outside the model, and its backward is wrong: where the outputs are moved, the loss changes by another amount than the gradient "
        "that arrived at them says",
        facts.intended,
        cause="loss",
        got=f"off by {', '.join(f'{abs(r.outside or 0.0):.2f}' for r in wrong)} of a random move's change, in steps {', '.join(str(r.step) for r in wrong)}",
        expected="0, within rounding",
        fix="Compare the gradient of the loss with that of a plain PyTorch version of it on the same outputs: look at custom autograd functions and fused losses.",
    )
    return dataclasses.replace(verdict, seen=(wrong[-1].step, wrong[-1].framework_step))


def _wrong(responses: Sequence[StepResponse]) -> list[StepResponse]:
    """The last touch that is off, and those of the same tensors before it."""
    bad = [r for r in responses if is_bad(r)]
    return [r for r in bad if set(r.slots) & set(bad[-1].slots) or not bad[-1].slots] if bad else []


def _fail(facts: Facts, wrong: list[StepResponse]) -> Verdict:
    last = wrong[-1]
    moved = set.intersection(*(set(r.slots) for r in wrong)) or set(last.slots)
    slots = mask(moved, len(facts.slots)) & facts.intended
    whole = bool((slots == facts.intended).all()) or not slots.any()
    names = some(facts.slots.names(slots))
    if last.stray is not None:
        message = f"the gradient of {len(moved)} adapter tensors is exactly zero, and the loss changes where they are moved: {names}"
        got = f"a change of {abs(last.stray):.1%} of that along the whole gradient"
        expected, cause = "none", "zero"
    else:
        where = "along it" if whole else f"along that of {names}"
        message = f"the gradient is not that of the loss: {where}, the loss changes by another amount than it says"
        got, expected, cause = (
            f"finite difference over gradient {', '.join(map(_said, wrong))}",
            "1, within rounding",
            "",
        )
    got += f" in steps {', '.join(str(r.step) for r in wrong)}"
    verdict = fail(
        message,
        facts.intended if whole else slots,
        got=got,
        expected=expected,
        cause=cause,
        fix=_FIX_ZERO if cause else "",
    )
    return dataclasses.replace(verdict, seen=(last.step, last.framework_step))


_FIX_ZERO = (
    "Look at the backward of what uses these tensors: a factor that belongs to each token or row and is taken from the first one (fused losses with weights), a "
    "mask, or a product that is left out. Without fused kernels the gradient must not be zero."
)


def _said(response: StepResponse) -> str:
    return f"{response.central:.2f}" if response.central is not None else f"{response.stray:.1%} of the whole"


def unsettled(response: StepResponse) -> bool:
    """What was measured up to now neither clears the gradient nor makes it impossible to judge."""
    return _off(response) and _why_not(response) is None


def is_bad(response: StepResponse) -> bool:
    """Everything that was asked says that the gradient is wrong, and enough was asked."""
    asked = response.own is not None if response.stray is None else response.near is not None
    return unsettled(response) and asked


def cleared(response: StepResponse) -> bool:
    """The gradient of what was moved is right, by a measurement that a wrong one would have failed."""
    central = response.central
    return response.why_not is None and central is not None and not _off(response) and response.noise <= OFF_16


def hopeless(responses: Sequence[StepResponse]) -> bool:
    """The last steps could not be judged for one reason, which will hold in the next ones as well."""
    last = responses[-PATIENCE:]
    reasons = {None if r.passing else r.why_not for r in last}
    # What follows a colon is of that step alone.
    kinds = {None if reason is None else reason.partition(":")[0] for reason in reasons}
    return len(last) == PATIENCE and len(kinds) == 1 and None not in kinds


def _off(response: StepResponse) -> bool:
    if response.stray is not None:
        return abs(response.stray) > STRAY
    return response.central is not None and _is_off(_best(response), response)


def _best(response: StepResponse) -> float:
    """The central difference; with that over a quarter of the way the third order can be taken out (Richardson)."""
    central, near = response.central, response.near
    assert central is not None
    return central if near is None else (16 * near - central) / 15


def _is_off(ratio: float, response: StepResponse) -> bool:
    return not abs(ratio - 1) <= (OFF_16 if response.sixteen else OFF)


def _why_not(response: StepResponse) -> str | None:
    """Why a step cannot be judged; what was not measured excludes nothing."""
    if response.why_not is not None:
        return response.why_not
    if response.stray is not None:
        return _why_not_zero(response)
    central, near, own, again = response.central, response.near, response.own, response.again
    if central is None or math.isnan(central):
        return "the gradient says that nothing changes along it"
    if not _off(response):
        return None
    if response.sides is not None and not _straight(response):
        return "ahead and behind, the loss changes by different amounts: no gradient fits both (a bend, or rounding)"
    if own is not None and not _is_off(own, response):
        return (
            "made anew from the outputs alone and a little aside, the gradient is right: either it holds more than what left "
            "the model, such as a penalty on weights or inner activations, or small moves are lost to rounding"
        )
    curved = near is not None and not abs(near - central) <= min(AGREE * min(1.0, abs(near)), abs(_best(response) - 1))
    apart = again is not None and not abs((own or 0.0) - again) <= AGREE * min(1.0, abs(own or 0.0)) + response.noise
    if curved or apart or (own is not None and not abs(own) > LEAST):
        return "finite differences of two sizes disagree: the forward is not precise enough, or too curved, for them"
    if not abs(_best(response) - 1) > SURE * response.noise:
        return "the change along the gradient is too small to be told from rounding"
    return None


def _straight(response: StepResponse) -> bool:
    ahead, behind = response.sides or (math.nan, math.nan)
    return abs(ahead - behind) <= APART and _is_off(ahead, response) and _is_off(behind, response)


def _why_not_zero(response: StepResponse) -> str | None:
    stray, near = response.stray, response.near
    assert stray is not None
    if abs(stray) <= STRAY:
        return None
    if near is not None and not abs(near - stray) <= 2 * AGREE * abs(stray):
        return "where tensors without a gradient are moved, the loss jumps: it is no smooth function of them"
    if not abs(stray) > SURE * response.noise:
        return "the change of the loss is too small to be told from rounding"
    return None


CHECK = Check(
    code="LP307",
    name="wrong-gradient",
    what="After a step, the training forward is run again with a part of the adapter moved a little along its gradient and back: the loss must change by what the "
    "gradient says. First the whole, then each tensor in turn, within 16 such looks; two looks at the same tensors must disagree by more than 2% (15% in 16 "
    "bits) and by four times what rounding makes of it, and so must a gradient that is made anew a little aside, at two distances.",
    why="A forward that runs differently when a checkpoint recomputes it gives the right loss and the gradient of another function; a fused kernel may be wrong "
    "in some tensors alone. Training goes on, worse.",
    fix="Compare the gradients with gradient checkpointing on and off under one seed; with checkpointing, keep preserve_rng_state=True and leave no state "
    "that one forward changes and the next one reads. Without it, look at custom autograd functions, fused kernels, and layers that merge the adapter in "
    "their forward (LoRA of nn.MultiheadAttention applies the one of out_proj twice, and its gradient knows of one; peft 0.21).",
    quiet="16 bits, in which small moves are lost to rounding as long as B is about zero; DoRA, VeLoRA and tuners other than LoRA, whose gradients approximate by design; kinks of a ReLU; penalties on weights, losses on inner activations, hooks that change gradients, clipping, scaling; what cannot be "
    "repeated is skipped with its reason. Small disagreements (dropout of a few percent) stay below what it can tell.",
    threads=(
        "Comfy-Org/ComfyUI#15846",
        "huggingface/peft#3774",
        "foundation-model-stack/fms-acceleration#97",
        "unslothai/unsloth-zoo#1275",
        "linkedin/Liger-Kernel#1298",
    ),
    explained_by=("LP308", "LP405"),
    needs=(
        "owned",
        "finite difference",
    ),
    judge=judge,
)
