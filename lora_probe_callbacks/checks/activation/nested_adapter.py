"""LP107: an adapter inside an adapter."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, some
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for PeftModels inside PeftModels and adapted layers inside adapter tensors."""
    if facts.nested:
        return fail(
            f"{len(facts.nested)} adapted layers lie inside other adapted layers: {some(facts.nested)}",
            facts.intended,
            cause="nested",
            got=f"{len(facts.nested)} nested adapted layers",
            expected="0",
        )
    if facts.rewrapped:
        return fail(
            f"a PeftModel is wrapped in a PeftModel ({some(facts.rewrapped)}): an adapter of the same name was "
            "initialised anew by the second wrap, and checkpoints get keys that do not load",
            facts.intended,
            cause="rewrapped",
            got=f"{len(facts.rewrapped)} PeftModel inside a PeftModel",
            expected="one PeftModel",
        )
    return ok()


CHECK = Check(
    code="LP107",
    name="nested-adapter",
    what="A PeftModel lies inside another one, or adapters were injected into adapters.",
    why="PEFT warns and goes on. What was loaded before is overwritten by a fresh adapter, or the adapter of an adapter "
    "trains, and the file that is saved does not load.",
    fix="Wrap once: get_peft_model(base, config) for a new adapter, PeftModel.from_pretrained(base, path, "
    "is_trainable=True) to go on with a saved one, model.add_adapter(name, config) for a second one.",
    quiet="Chains that PEFT builds by itself (several target_parameters of one module, MultiheadAttention).",
    threads=("huggingface/lerobot#3459", "huggingface/peft#793"),
    judge=judge,
)
