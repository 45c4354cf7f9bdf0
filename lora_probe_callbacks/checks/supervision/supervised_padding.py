"""LP002: padding among the targets."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, absent, ok, warn
from lora_probe_callbacks.facts import Facts

ONE = 1  # a row: the first pad may stand for the end of the answer


def judge(facts: Facts) -> Verdict:
    """Look for rows that are trained to predict padding."""
    step = facts.supervision
    if step is None or not step.causal:
        return absent("no causal language model was seen to train")
    rows = int((step.padding > ONE).sum())
    if not rows:
        return ok()
    padding, supervised = int(step.padding.sum()), int(step.supervised.sum())
    return warn(
        f"padding is supervised: {padding} of the {supervised} tokens that this step trains on are padding",
        got=f"{rows} of {len(step)} rows trained to predict tokens whose attention_mask is 0",
        expected="labels of -100 where attention_mask is 0",
        fix="set labels[attention_mask == 0] = -100 in the collator. If the padding is meant to be learned, ignore LP002",
    )


CHECK = Check(
    code="LP002",
    name="supervised-padding",
    what="The loss reaches positions whose target has an attention_mask of 0. It warns.",
    why="With labels=input_ids the loss falls quickly, on padding; the more padding, the less the answers count.",
    fix="Set the labels of padding to -100.",
    quiet="One token of padding behind a row, which may stand for its end; batches without an attention mask; packed rows.",
    threads=("huggingface/trl#1625", "open-jarvis/OpenJarvis#521"),
    needs=("supervision",),
    judge=judge,
)
