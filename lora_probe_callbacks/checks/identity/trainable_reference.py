"""LP207: a reference adapter is trainable."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for declared references whose tensors require gradients."""
    references = [o for o in facts.others if o.declared == "reference"]
    if not references:
        return skipped("no reference adapter was declared")
    if facts.moment == "start" and any(o.active_now for o in references):
        return pending("a reference adapter is active at this moment, perhaps for its own forward")
    trainable = [o for o in references if o.trainable]
    if not trainable:
        return ok()
    first = trainable[0]
    # Where the expected adapter got nothing in this step, the reference took its place: one fault, told here.
    in_its_place = first.active_now and not (facts.gradients.present & ~facts.gradients.zero).any()
    units = facts.bad_units("inactive") if in_its_place else frozenset()
    more = f", and active instead of {list(facts.expected)}" if units else ""
    return fail(
        f"reference adapter {first.name!r} is trainable: {first.trainable} of its {first.tensors} tensors require gradients{more}",
        facts.slots_of_units(units),
        cause=first.name,
        got=f"{first.trainable} of {first.tensors} trainable, {first.owned} in an optimizer",
        expected=f"0 of {first.tensors} trainable",
        fix=f"after every `with model.disable_adapter():` and every set_adapter, call model.set_requires_grad({first.name!r}, "
        "requires_grad=False)"
        + (f", and set_adapter({facts.expected[0]!r}) before the training forward" if units else ""),
    )


CHECK = Check(
    code="LP207",
    name="trainable-reference",
    what="An adapter that was declared as a reference requires gradients when the optimizer is about to step.",
    why="Leaving `with model.disable_adapter():` sets requires_grad on every active adapter, frozen ones included (peft 0.21). The "
    "reference then learns with the policy, and the KL term measures nothing.",
    fix="Freeze it again after the context: model.set_requires_grad(name, requires_grad=False).",
    quiet="A reference that is active for its own forward.",
    threads=("huggingface/peft#3447", "huggingface/peft#3453"),
    judge=judge,
)
