"""LP202: the optimizer holds a tensor that the model has replaced."""

from __future__ import annotations

import dataclasses

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, some
from lora_probe_callbacks.facts import CopiesFact, Facts, mask

STEPS = 3  # of copies that move while the adapter stands: one that writes back a step late is healthy


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
        return ok() if facts.copies is None else _copies(facts, facts.copies)
    names = facts.slots.names(facts.replaced)
    # What stands beside them in the same place is new as well: a parametrization makes two tensors out of one.
    beside = facts.slots_of_units(facts.slots.unit[list(facts.replaced)].tolist()) & ~facts.slots.owned
    return fail(
        f"the optimizer steps {facts.foreign_in_optimizer} tensors that the model does not hold, in place of {len(names)} of its "
        f"adapter tensors ({some(names)}): they were replaced after it was built, or belong to another model",
        mask(facts.replaced, len(facts.slots)) | beside,
        got=f"{facts.foreign_in_optimizer} orphaned tensors of the same shapes in the optimizer",
        expected="the tensor objects that the model holds now",
    )


def _copies(facts: Facts, copies: CopiesFact) -> Verdict:
    names = some(facts.slots.names(copies.slots))
    who = (
        f"the optimizer steps {facts.foreign_in_optimizer} tensors that the model does not hold, copies of {len(copies.slots)} of its "
        f"adapter tensors ({names})"
    )
    if copies.starved is not None:
        verdict = fail(
            f"{who}: the adapter got gradients, and the copies none",
            copies.slots,
            cause="copies",
            got="equal values when training began, and no gradient on any copy when the optimizer stepped",
            expected="the tensor objects that the model holds now",
        )
        return dataclasses.replace(verdict, seen=copies.starved)
    if copies.still >= STEPS:
        return fail(
            f"{who}: they move, and nothing writes them back to the adapter, which stands still",
            copies.slots,
            cause="copies",
            got=f"the copies changed in {copies.still} probed steps in a row, and not one adapter tensor",
            expected="the values of the copies, after each step",
            fix="copy the values back after optimizer.step(), under torch.no_grad(): parameter.copy_(master)",
        )
    if copies.followed:
        return ok()
    return pending(f"{who}: judged once a step shows whether anything writes them back")


CHECK = Check(
    code="LP202",
    name="replaced-tensor",
    what="The optimizer owns a tensor that stood where the model now holds another object; or a copy of it that gets no gradient, or is never written back.",
    why="get_peft_model() twice, delete and add again, load_state_dict(assign=True), fully_shard() and deepcopy keep all names and "
    "shapes. The optimizer goes on with orphans.",
    fix="Build the optimizer after the last call that makes adapter tensors anew, or build it again.",
    quiet="Moves with .to(), which keep the objects; float32 copies of the adapter that a loop feeds with its gradients and writes back (mixed precision by hand, "
    "an optimizer on another device): they are told from orphans by their first steps.",
    threads=("huggingface/lerobot#3459", "huggingface/peft#793", "pytorch/pytorch#149205"),
    explained_by=("LP107",),
    needs=("owned",),
    early=True,
    judge=judge,
)
