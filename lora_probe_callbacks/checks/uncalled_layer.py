"""LP104: an adapted layer is passed by, and its adapter gets no gradient."""

from __future__ import annotations

from lora_probe_callbacks.checks.base import PERSISTENT, Check, Verdict, fail, ok, pending, some, warn
from lora_probe_callbacks.observe.facts import Facts

LONG = 4 * PERSISTENT  # a part of the model may have no input for a while: no image, no token for the expert


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
        and facts.intended.intersection(facts.units[u].slots)
    ]
    if not uncalled:
        return ok()
    bypassed = [u for u in uncalled if facts.units[u].base_weight_used]
    if bypassed:
        names = [facts.units[u].name for u in bypassed]
        return fail(
            f"{some(names)}: the base weight is used, the adapted layer is never called, so its adapter "
            "neither acts nor learns",
            facts.slots_of_units(bypassed),
            got="0 calls, and the weight read by another operation",
            expected="the layer called in the training forward",
        )
    left_out = [
        u
        for u in uncalled
        if facts.units[u].idle_part == "layer"
        and all(facts.history[s].read >= PERSISTENT for s in facts.units[u].slots)
    ]
    if left_out:
        names = [facts.units[u].name for u in left_out]
        return warn(
            f"{some(names)}: never called in {PERSISTENT} probed steps, while the module around it was",
            facts.slots_of_units(left_out),
            got="0 calls",
            expected="called, unless its input was absent from every batch",
            fix="if its input was absent so far (no image, no token routed here) nothing is wrong; else the "
            "module around it reads the weight instead of calling the layer: call the layer",
        )
    absent = [
        u
        for u in uncalled
        if all(facts.history[s].read >= LONG and not facts.history[s].had_signal for s in facts.units[u].slots)
    ]
    if absent:
        names = [facts.units[u].name for u in absent]
        return warn(
            f"{some(names)}: never called in {LONG} probed steps, nor was the part of the model around it",
            facts.slots_of_units(absent),
            cause="absent",
            got="0 calls",
            expected="called in some batch",
            fix="if the data has no input for this part (no image, no audio) leave it out of target_modules, or pass frozen=(a part of "
            "its name,); else look for outputs of it that are cached or computed elsewhere",
        )
    return pending(
        f"{len(uncalled)} adapted layers have not run yet ({some([facts.units[u].name for u in uncalled])}): "
        "not judged before they do"
    )


def _without_signal(facts: Facts, unit: int) -> bool:
    read = [g for s in facts.units[unit].slots if (g := facts.gradients[s]) is not None]
    return bool(read) and all(not g.present or g.zero for g in read)


CHECK = Check(
    code="LP104",
    name="uncalled-layer",
    what="An adapted layer is never called in the training forward, its base weight is used there all the "
    "same, and its adapter's gradient is None or zero.",
    why="Fused losses multiply with lm_head.weight and fused kernels take out_proj.weight; on an adapted layer "
    "that is the frozen base weight. All other layers learn, so the loss falls.",
    fix="Take the layer out of target_modules, or switch off the fused loss or kernel that reads its weight.",
    quiet="Kernels that read the LoRA weights themselves (gradients arrive, whoever called what); experts without "
    "a token, towers without an input; compiled models, whose layers cannot be watched.",
    threads=("huggingface/trl#4612", "huggingface/trl#6159", "huggingface/peft#2274"),
    explained_by=("LP203", "LP209"),
    judge=judge,
)
