"""LP202: the optimizer holds a tensor that the model has replaced."""

from __future__ import annotations

from lora_probe_callbacks.checks.base import Check, Verdict, fail, ok, pending, some
from lora_probe_callbacks.observe.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for adapter tensors whose predecessors are still in an optimizer."""
    if facts.optimizers == 0:
        return pending("no optimizer is known yet")
    if facts.vanished:
        return fail(
            f"{len(facts.vanished)} adapter tensors that the optimizer steps have left the model with their layers: {some(facts.vanished)}",
            cause="vanished",
            got=f"{len(facts.vanished)} tensors in the optimizer whose layers the model no longer holds",
            expected="the layers that the model had when training began",
            fix="find what exchanges modules while training runs (a quantiser, an unload, a patch), and do it before the optimizer is built",
        )
    if not facts.replaced:
        return ok()
    names = [facts.slots[i].name for i in facts.replaced]
    return fail(
        f"the optimizer steps {facts.foreign_in_optimizer} tensors that the model does not hold, in place of {len(names)} of its "
        f"adapter tensors ({some(names)}): they were replaced after it was built, or belong to another model",
        facts.replaced,
        got=f"{facts.foreign_in_optimizer} orphaned tensors of the same shapes in the optimizer",
        expected="the tensor objects that the model holds now",
    )


CHECK = Check(
    code="LP202",
    name="replaced-tensor",
    what="The optimizer owns a tensor that stood where the model now holds another object.",
    why="get_peft_model() twice, delete and add again, load_state_dict(assign=True), fully_shard() and deepcopy keep all names and "
    "shapes. The optimizer goes on with orphans.",
    fix="Build the optimizer after the last call that makes adapter tensors anew, or build it again.",
    quiet="Moves with .to(), which keep the objects.",
    threads=("huggingface/lerobot#3459", "huggingface/peft#793", "pytorch/pytorch#149205"),
    explained_by=("LP107",),
    judge=judge,
)
