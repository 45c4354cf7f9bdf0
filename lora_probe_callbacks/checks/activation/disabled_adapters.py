"""LP102: the adapters are switched off in the forward that trains."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending
from lora_probe_callbacks.checks.estimator._estimators import also_at_estimators
from lora_probe_callbacks.facts import Facts, count


def judge(facts: Facts) -> Verdict:
    """Look for whole adapters that every training forward of the step had disabled."""
    forwards = facts.training_forwards
    if not forwards:
        return pending(facts.unobservable or "no training forward was seen in this step")
    disabled = facts.bad_units("disabled")
    whole = [units for name in facts.expected if (units := facts.units_of(name)) and units <= disabled]
    units = frozenset().union(*whole)
    if not units or all(facts.modes[u] == "active" for u in units):
        return ok()  # switched on since: LP105
    return fail(
        f"all adapters were disabled in the training forward: the base model is trained through, "
        f"{count(facts.slots_of_units(units))} adapter tensors get no gradient",
        facts.slots_of_units(units),
        got=f"{len(units)} of {len(facts.units)} adapted layers disabled in {forwards[0].module}",
        expected="enabled",
    )


CHECK = Check(
    code="LP102",
    name="disabled-adapters",
    what="The adapters are disabled in every training forward of the step.",
    why="With gradient checkpointing the inputs require gradients, so backward() succeeds, the loss is "
    "printed, and nothing that trains takes part.",
    fix="Call enable_adapter_layers() (PEFT) or enable_adapters() (transformers) before the forward; "
    "prefer the context manager `with model.disable_adapter():`, which switches them on again by itself.",
    quiet="`with model.disable_adapter():` around a reference forward, under no_grad or detached.",
    threads=("huggingface/peft#912", "huggingface/peft#493", "unslothai/unsloth#3068"),
    judge=also_at_estimators(judge),
)
