"""LP814: the adapter is there, and not as it was trained."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail
from lora_probe_callbacks.checks.serving._served import each_served, measured
from lora_probe_callbacks.facts import Facts, ServedFact


def judge(facts: Facts) -> Verdict:
    """Look for targets that lost a part of the effect to rounding, or have it at another scale."""
    return each_served(facts, "lossy", _judge)


def _judge(served: ServedFact) -> Verdict:
    if served.scale is not None:
        return fail(
            f"{served.target} has the whole adapter at {served.scale:.3g} times its scale",
            cause=served.target,
            got=f"{measured(served)}; the live model fits at {served.scale:.3g} times its scaling",
            expected="the scaling of training: lora_alpha / r, with rsLoRA lora_alpha / sqrt(r)",
            fix="compare lora_alpha, r, use_rslora and the patterns in adapter_config.json with what the engine reads; a factor of 2 is an adapter on a base into which it was merged already",
        )
    best = "" if served.best is None else f"; rounding to {served.dtype} costs {served.best:.0%} at best"
    return fail(
        f"{served.target} differs from the trained model by {served.lost:.0%} of what the adapter does{best}",
        cause=served.target,
        got=measured(served),
        expected="a tenth of the effect at most",
        fix=_fix(served),
    )


def _fix(served: ServedFact) -> str:
    if served.best is not None and served.lost > 2 * served.best:
        return "merge in float32 and round once: this merge has lost more than its type must"
    if served.merged:
        return "this type cannot hold what the adapter has changed: export in float32 or bfloat16, or serve the adapter beside its base"
    return "look for what else differs from training: the type that the engine computes in, or another base"


CHECK = Check(
    code="LP814",
    name="served-with-loss",
    what="What was merged or is served follows the trained adapter, but differs from it by more than a tenth of its effect: weights were rounded, or LoRA's scale is another. For a merge it says what rounding to its type costs at best.",
    why="A merge rounds base and adapter together; a small change is lost in a step of the type, and nothing is said.",
    fix="Merge in float32 and round once, export in a wider type, or serve the adapter beside its base.",
    quiet="A loss below a tenth of the effect, which every 16-bit export has.",
    threads=(
        "unslothai/unsloth#2142",
        "huggingface/peft#2586",
        "axolotl-ai-cloud/axolotl#3803",
        "modelscope/ms-swift#7907",
    ),
    needs=("serving",),
    judge=judge,
)
