"""LP202: the optimizer holds a tensor that the model has replaced."""

from __future__ import annotations

from lora_probe_callbacks.checks.base import Check, Verdict, fail, ok, pending, some
from lora_probe_callbacks.observe.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for adapter tensors whose predecessors are still in an optimizer."""
    if facts.optimizers == 0:
        return pending("no optimizer is known yet")
    if not facts.replaced:
        return ok()
    names = [facts.slots[i].name for i in facts.replaced]
    return fail(
        f"{len(names)} adapter tensors were replaced after the optimizer was built: it steps "
        f"{facts.foreign_in_optimizer} tensors that the model no longer holds ({some(names)})",
        facts.replaced,
        got=f"{facts.foreign_in_optimizer} orphaned tensors in the optimizer, of the same shapes under the same names",
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
