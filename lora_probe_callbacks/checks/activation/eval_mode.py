"""LP111: the training forward runs in eval mode, and what was configured for training is off."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, ok, pending, some, warn
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for configured dropout and checkpointing that do not act."""
    forwards = [f for f in facts.forwards if f.received]
    if not forwards:
        return pending(facts.unobservable or "no training forward was seen in this step")
    off = sorted(frozenset[int]().union(*(f.in_eval for f in forwards)))
    if off:
        return warn(
            f"lora_dropout is configured and off: {len(off)} adapted layers run in eval mode in the training forward, "
            f"{some([facts.units[u].name for u in off])}",
            cause="dropout",
            got="training=False in a forward that receives a gradient",
            expected="training=True",
            fix="call model.train() before training and after every evaluation; from_pretrained() returns a model in eval mode, and Lightning "
            "leaves it as it is since 2.2; if dropout should not act, set lora_dropout=0",
        )
    unchecked = max(f.unchecked for f in forwards)
    if unchecked:
        return warn(
            f"gradient checkpointing is on and does nothing: {unchecked} of the modules that should checkpoint are in eval mode",
            cause="checkpointing",
            got="gradient_checkpointing=True and training=False",
            expected="training=True: transformers checkpoints in train mode alone",
            fix="call model.train() before training and after every evaluation; if the model should stay in eval mode, switch checkpointing off",
        )
    return ok()


CHECK = Check(
    code="LP111",
    name="eval-mode",
    what="In a training forward lora_dropout is above 0 and its module is in eval mode, or gradient checkpointing is switched on and the block is in eval "
    "mode. It warns.",
    why="from_pretrained() returns a model in eval mode, and an evaluation may leave it so. Training goes on without dropout, and with the memory of a "
    "run without checkpointing.",
    fix="Call model.train() before training and after every evaluation.",
    quiet="A dropout of 0, as TRL sets it; forwards beside training; dropout of the base model, which nothing here configured.",
    threads=("Lightning-AI/pytorch-lightning#20105",),
    judge=judge,
)
