"""LP806: the adapter was put on another base than the one it was trained on."""

from __future__ import annotations

import math

from lora_probe_callbacks.checks._base import Check, Verdict, absent, fail, ok, skipped
from lora_probe_callbacks.facts import Facts

MOST = 0.02  # relative: rounding to 16 bits is below 0.5 %, PiSSA takes away more than a tenth


def judge(facts: Facts) -> Verdict:
    """Compare sampled base weights with those under the saved adapter."""
    resumed = facts.restored
    if resumed is None:
        return absent("no saved state was restored")
    if resumed.base is None:
        return skipped(resumed.why_no_base or "no base weight was sampled")
    if facts.trainable_bases:
        return skipped("the base trains as well")
    if resumed.base <= MOST:
        return ok()
    return fail(
        f"the base weight of {resumed.base_layer} is not the one that the adapter in {resumed.source} was trained on",
        facts.intended,
        cause="base",
        got="another shape" if math.isinf(resumed.base) else f"relative distance {resumed.base:.2g}",
        expected=f"at most {MOST:g}",
    )


CHECK = Check(
    code="LP806",
    name="other-base",
    what="A run that goes on from a checkpoint has other weights under its adapter than the run that wrote it. A few elements of up to 16 adapted layers are "
    "kept in the probe's state.",
    why="PiSSA, OLoRA, CorDA and LoftQ change the base when they initialise: their adapter belongs to the residual, and on the original base it is another model. "
    "Nothing in an adapter file says which base that was.",
    fix="Load the base that was trained on: save the residual model beside the adapter, or convert the adapter to plain LoRA with "
    "save_pretrained(path_initial_model_for_weight_conversion=...); load with PeftModel.from_pretrained, which initialises as the config says.",
    quiet="Another precision; the rounding of merges, which is LP404's; a base that trains; layers that are merged at this moment; a base quantised in another way.",
    threads=("huggingface/peft#1929", "huggingface/peft#1930", "huggingface/peft#1626", "huggingface/peft#1525"),
    explained_by=("LP803",),
    needs=("resume",),
    judge=judge,
)
