"""LP104: an adapted layer is passed by, and its adapter gets no gradient."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, some, warn
from lora_probe_callbacks.facts import Facts

# A part of the model may have no input for long: no image, no token for the expert. Judged over this many
# probed steps and this many steps.
LONG, LONG_STEPS = 4 * PERSISTENT, 100


def judge(facts: Facts) -> Verdict:
    """Look for layers that no training forward called although their base weight took part."""
    called = facts.called_units
    if called is None:
        return pending(facts.unobservable or "no training forward whose layers can be seen")
    uncalled = [
        u
        for u in range(len(facts.units))
        if u not in called
        and u not in facts.bad_units()
        and _without_signal(facts, u)
        and facts.intended[list(facts.units[u].slots)].any()
    ]
    if not uncalled:
        return ok()
    bypassed = [u for u in uncalled if facts.units[u].base_weight_used and not _in_the_graph(facts, u)]
    if bypassed:
        names = [facts.units[u].name for u in bypassed]
        return fail(
            f"{some(names)}: the base weight is used, the adapted layer is never called, so its adapter "
            "neither acts nor learns",
            facts.slots_of_units(bypassed),
            got="0 calls, and the weight read by another operation",
            expected="the layer called in the training forward",
        )
    never = [u for u in uncalled if not facts.history.had_signal[list(facts.units[u].slots)].any()]
    if not never:
        return ok()  # they learned in other batches and had nothing to do in this one
    absent = [u for u in never if (facts.history.reads[list(facts.units[u].slots)] >= LONG).all()]
    if absent and facts.step >= LONG_STEPS:
        return warn(
            f"{some([facts.units[u].name for u in absent])}: never called in {facts.step} steps",
            facts.slots_of_units(absent),
            cause="absent",
            got="0 calls",
            expected="called in some batch",
            fix="if the data has no input for this part (no image, no audio, no token for the expert), leave it out of target_modules or pass "
            "frozen=(a part of its name,); else look for outputs of it that are cached, or computed from its weight",
        )
    return pending(
        f"{len(never)} adapted layers have not run yet ({some([facts.units[u].name for u in never])}): "
        "not judged before they do"
    )


def _without_signal(facts: Facts, unit: int) -> bool:
    slots = list(facts.units[unit].slots)
    gradients = facts.gradients
    return bool(gradients.read[slots].any()) and not (gradients.present & ~gradients.zero)[slots].any()


def _in_the_graph(facts: Facts, unit: int) -> bool:
    """Whether autograd came to the adapter without a call: a kernel that reads its tensors itself.

    A gradient of exactly zero came from there, or stands for None (``set_to_none=False``). Which of the two
    shows when the other layers learn and this one goes on without.

    Args:
        facts: What is known.
        unit: A unit whose layer was not called.

    Returns:
        True if its gradient, or the graph, shows a use.
    """
    slots, gradients = list(facts.units[unit].slots), facts.gradients
    if any(s in f.reached for f in facts.training_forwards if f.reached is not None for s in slots):
        return True
    if not gradients.present[slots].any():
        return False
    others_learn = (gradients.present & ~gradients.zero).any()
    return bool(not others_learn or (facts.history.zero[slots] < PERSISTENT).any())


CHECK = Check(
    code="LP104",
    name="uncalled-layer",
    what="An adapted layer (or a modules_to_save copy) is never called in the training forward, its base weight (or the original) is used there all the "
    "same, and its adapter's gradient is None or zero. It warns if a layer was not called once in a hundred steps.",
    why="Fused losses multiply with lm_head.weight and fused kernels take out_proj.weight; on an adapted layer "
    "that is the frozen base weight. All other layers learn, so the loss falls.",
    fix="Take the layer out of target_modules, or switch off the fused loss or kernel that reads its weight.",
    quiet="Kernels that read the LoRA weights themselves (gradients arrive, whoever called what); experts without "
    "a token, towers without an input; compiled models, whose layers cannot be watched.",
    threads=("huggingface/trl#4612", "huggingface/trl#6159", "huggingface/peft#2274"),
    explained_by=("LP203", "LP209"),
    sets_ranks_apart=True,
    judge=judge,
)
