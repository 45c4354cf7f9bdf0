"""LP203: an adapter tensor that should train is frozen."""

from __future__ import annotations

import numpy as np

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, some, warn
from lora_probe_callbacks.facts import Bools, Facts, count


def judge(facts: Facts) -> Verdict:
    """Look for active adapters whose tensors do not require gradients."""
    slots = facts.slots
    judged = facts.intended & facts.on_now & _their_turn(facts)
    if not judged.any():
        return pending("the adapter is not active at this moment, or its optimizer has not had its turn")
    frozen = judged & ~slots.requires_grad
    if not frozen.any():
        return ok()
    for adapter in facts.expected:
        mine = judged & slots.of_adapter(adapter)
        if mine.any() and not (mine & ~frozen).any():
            return fail(
                f"all {count(mine)} tensors of adapter {adapter!r} are frozen (requires_grad=False)",
                frozen,
                cause=adapter,
                got=f"0 of {count(mine)} trainable",
                expected=f"{count(mine)} of {count(mine)}",
            )
    a, b = judged & slots.of_role("A"), judged & slots.of_role("B")
    if np.array_equal(frozen, a) and b.any():
        return ok()  # LoRA-FA trains B alone
    if np.array_equal(frozen, b) and a.any() and facts.history.had_signal[frozen].all():
        return ok()  # A and B are trained in turns
    number, total = count(frozen), count(judged)
    return warn(
        f"{number} of {total} adapter tensors are frozen: {some(slots.names(frozen))}",
        frozen,
        got=f"{total - number} of {total} trainable",
        expected=f"{total} of {total}, or the frozen ones declared",
        fix="if they are meant to stay as they are, pass frozen=(a part of their names,); if not, set requires_grad",
    )


def _their_turn(facts: Facts) -> Bools:
    """With several optimizers, toggle_optimizer freezes what the others own: ask at the owner's event."""
    owner = facts.slots.owner
    if facts.optimizers < 2:
        return np.ones(len(facts.slots), np.bool_)
    turn: Bools = (owner < 0) | (owner == facts.optimizer)
    return turn


CHECK = Check(
    code="LP203",
    name="frozen-adapter",
    what="A tensor of an active adapter has requires_grad=False. It fails if the whole adapter is frozen, and warns if a part is.",
    why="PeftModel.from_pretrained() loads for inference by default, prepare_model_for_kbit_training() and freeze loops freeze "
    "adapters too when they come after them. With gradient checkpointing backward() succeeds all the same.",
    fix="Load with is_trainable=True; call prepare_model_for_kbit_training() and freeze loops before the adapter is attached.",
    quiet="LoRA-FA (every A frozen, every B trained), A and B trained in turns, frozen=(...), toggle_optimizer, adapters that are not active.",
    threads=(
        "huggingface/peft#282",
        "huggingface/trl#3926",
        "huggingface/transformers#26098",
        "X-GenGroup/Flow-Factory#56",
    ),
    explained_by=("LP101", "LP102", "LP105", "LP106", "LP605"),
    judge=judge,
)
