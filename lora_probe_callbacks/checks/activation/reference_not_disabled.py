"""LP109: the reference that should be this model without its adapters has them on."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, skipped
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for forwards beside training that never ran with the adapters disabled."""
    reference = facts.reference
    if reference is None:
        return skipped("the reference was not declared to be the disabled model")
    if reference.disabled:
        return ok()
    if reference.active < PERSISTENT:
        return pending("no forward with the adapters disabled was seen: no reference was computed yet, or beforehand")
    return fail(
        f"no forward ran with the adapters disabled, and forwards beside training had them active in {reference.active} "
        "probed steps: policy and reference are the same weights",
        cause="active",
        got=f"every forward without gradients with {list(facts.active)} active",
        expected="the reference forward with the adapters disabled",
    )


CHECK = Check(
    code="LP109",
    name="reference-not-disabled",
    what="reference='disabled' was declared, and in four probed steps forwards without gradients ran, all of them with the "
    "adapter active and none with the adapters disabled.",
    why="The log-ratio of policy and reference is exactly zero in every step: DPO stands at 0.6931 and a KL term at 0, while "
    "gradients are not zero and parameters move.",
    fix="Compute the reference inside `with model.disable_adapter():`, and see that nothing enables the adapters there. If the "
    "reference was computed before training, leave reference='disabled' out.",
    quiet="References that were computed beforehand; generation and old log-probabilities beside a reference; without the declaration "
    "it is skipped.",
    threads=("huggingface/trl#1311", "huggingface/trl#1843", "NVIDIA-NeMo/Megatron-Bridge#5945"),
    explained_by=(),
    judge=judge,
)
