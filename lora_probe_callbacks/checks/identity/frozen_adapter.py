"""LP203: an adapter tensor that should train is frozen."""

from __future__ import annotations

import numpy as np

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, some, warn
from lora_probe_callbacks.facts import Bools, Facts, count

LONG_STEPS = 100  # for which a part that the optimizer owns may wait for its first turn


def judge(facts: Facts) -> Verdict:
    """Look for active adapters whose tensors do not require gradients."""
    slots = facts.slots
    judged = facts.intended & facts.on_now & facts.their_turn
    if not judged.any():
        return pending("the adapter is not active at this moment, or its optimizer has not had its turn")
    frozen = judged & ~slots.requires_grad
    if not frozen.any():
        return ok()
    for adapter in facts.expected:
        mine = judged & slots.of_adapter(adapter)
        if mine.any() and not (mine & ~frozen).any():
            return _whole(facts, adapter, mine, frozen)
    later = judged & facts.frozen_later
    return _later(facts, later, judged) if later.any() else _part(facts, frozen, judged)


def _whole(facts: Facts, adapter: str, mine: Bools, frozen: Bools) -> Verdict:
    ever = facts.history.had_signal[mine].any() or facts.history.thawed[mine].any()
    if facts.others_train and facts.slots.owned[mine].all() and not ever and facts.moment != "end":
        return pending(
            f"adapter {adapter!r} is frozen, and the optimizer owns it beside what trains: its turn may come"
        )
    if facts.thaw_announced and not ever and facts.moment != "end":
        return pending(f"adapter {adapter!r} is frozen until a callback thaws it")
    return fail(
        f"all {count(mine)} tensors of adapter {adapter!r} are frozen (requires_grad=False)",
        frozen,
        cause=adapter,
        got=f"0 of {count(mine)} trainable",
        expected=f"{count(mine)} of {count(mine)}",
    )


def _later(facts: Facts, later: Bools, judged: Bools) -> Verdict:
    """They have learned, and stopped. Turns are quiet: where something freezes, something else thaws."""
    since = int(facts.history.frozen_since[later].min())
    return warn(
        f"{count(later)} of {count(judged)} adapter tensors have trained and are frozen since step {since}: "
        f"{some(facts.slots.names(later))}",
        later,
        cause="later",
        got=f"requires_grad=False since step {since}, and nothing else thawed",
        expected="what trained goes on to train",
        fix="look for what sets requires_grad, or switches adapters, at this step (an evaluation, a callback, another model that shares the "
        "layers); if these tensors are meant to stop here nothing is wrong",
    )


def _part(facts: Facts, frozen: Bools, judged: Bools) -> Verdict:
    slots, history = facts.slots, facts.history
    a, b = judged & slots.of_role("A"), judged & slots.of_role("B")
    if np.array_equal(frozen, a) and b.any():
        return ok()  # LoRA-FA trains B alone
    if history.thawed.any():
        return ok()  # turns: what trains changes, and the proofs tell of what never had one
    if slots.owned[frozen].all() and facts.step < LONG_STEPS and facts.moment != "end":
        return pending(f"{count(frozen)} adapter tensors are frozen, and the optimizer owns them: their turn may come")
    number, total = count(frozen), count(judged)
    return warn(
        f"{number} of {total} adapter tensors are frozen: {some(slots.names(frozen))}",
        frozen,
        got=f"{total - number} of {total} trainable",
        expected=f"{total} of {total}, or the frozen ones declared",
        fix="if they are meant to stay as they are, pass frozen=(a part of their names,); if not, set requires_grad",
    )


CHECK = Check(
    code="LP203",
    name="frozen-adapter",
    what="A tensor of an active adapter has requires_grad=False. It fails if the whole adapter is frozen, and warns if a part is, or is frozen after it has trained.",
    why="PeftModel.from_pretrained() loads for inference by default, prepare_model_for_kbit_training() and freeze loops freeze "
    "adapters too when they come after them. With gradient checkpointing backward() succeeds all the same.",
    fix="Load with is_trainable=True; call prepare_model_for_kbit_training() and freeze loops before the adapter is attached.",
    quiet="LoRA-FA (every A frozen from the start, every B trained), turns (LISA, BAdam, A and B: where one part freezes another thaws), an adapter "
    "that the optimizer owns and that is thawed later, frozen=(...), toggle_optimizer, adapters that are not active.",
    threads=(
        "huggingface/peft#282",
        "huggingface/trl#3926",
        "huggingface/transformers#26098",
        "X-GenGroup/Flow-Factory#56",
    ),
    explained_by=("LP101", "LP102", "LP105", "LP106", "LP605"),
    judge=judge,
)
