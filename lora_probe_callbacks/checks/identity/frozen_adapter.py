"""LP203: an adapter tensor that should train is frozen."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, some, warn
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for active adapters whose tensors do not require gradients."""
    judged = [
        i
        for i in sorted(facts.intended)
        if facts.modes[facts.slots[i].unit] in ("active", "merged") and _is_its_turn(facts, i)
    ]
    frozen = [i for i in judged if not facts.slots[i].requires_grad]
    if not judged:
        return pending("the adapter is not active at this moment, or its optimizer has not had its turn")
    if not frozen:
        return ok()
    names = [facts.slots[i].name for i in frozen]
    for adapter in facts.expected:
        mine = [i for i in judged if facts.slots[i].adapter == adapter]
        if mine and all(i in frozen for i in mine):
            return fail(
                f"all {len(mine)} tensors of adapter {adapter!r} are frozen (requires_grad=False)",
                frozen,
                cause=adapter,
                got=f"0 of {len(mine)} trainable",
                expected=f"{len(mine)} of {len(mine)}",
            )
    by_role = {role: [i for i in judged if facts.slots[i].role == role] for role in ("A", "B", "other")}
    if set(frozen) == set(by_role["A"]) and by_role["B"]:
        return ok()  # LoRA-FA trains B alone
    if set(frozen) == set(by_role["B"]) and by_role["A"] and all(facts.history[i].had_signal for i in frozen):
        return ok()  # A and B are trained in turns
    return warn(
        f"{len(frozen)} of {len(judged)} adapter tensors are frozen: {some(names)}",
        frozen,
        got=f"{len(judged) - len(frozen)} of {len(judged)} trainable",
        expected=f"{len(judged)} of {len(judged)}, or the frozen ones declared",
        fix="if they are meant to stay as they are, pass frozen=(a part of their names,); if not, set requires_grad",
    )


def _is_its_turn(facts: Facts, slot: int) -> bool:
    """With several optimizers, toggle_optimizer freezes what the others own: ask at the owner's event."""
    owner = facts.slots[slot].owner
    return facts.optimizers < 2 or owner is None or owner == facts.optimizer


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
