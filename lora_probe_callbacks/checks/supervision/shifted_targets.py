"""LP005: positions are taught another token than the next."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, absent, fail, ok, warn
from lora_probe_callbacks.facts import Facts

ENOUGH = 8  # targets that were read
NEARLY_ALL, FEW = 0.9, 0.5


def judge(facts: Facts) -> Verdict:
    """Compare the tokens that the gradient teaches with those of the row."""
    step = facts.supervision
    if step is None or not step.causal or step.read < ENOUGH:
        return absent("no targets of a causal language model could be read")
    if step.following > FEW * step.read:
        return ok()
    if step.skipping >= NEARLY_ALL * step.read:
        return fail(
            "the targets are shifted twice: each position is taught the token after the next",
            facts.intended,
            cause="twice",
            got=f"{step.skipping} of {step.read} targets are the token after the next, and {step.following} the next",
            expected="the next token",
            fix="the model shifts its labels itself: pass labels=input_ids, or what the collator has shifted as shift_labels",
        )
    # A model that is only exercised may be taught anything: with text it is hardly meant.
    if step.same >= NEARLY_ALL * step.read and facts.has_tokenizer:
        return warn(
            "the targets are not shifted: each position is taught the token that it has just read",
            cause="never",
            got=f"{step.same} of {step.read} targets are the token at their own position, and {step.following} the next",
            expected="the next token",
            fix="compare logits[:, :-1] with labels[:, 1:]; if the model is meant to copy its input, ignore LP005",
        )
    return ok()


CHECK = Check(
    code="LP005",
    name="shifted-targets",
    what="In a causal language model nearly all targets, read off the gradient of the logits, are the token after the next: it fails. It warns if they are the token "
    "that was just read, where a tokenizer says that the model reads text.",
    why="Labels that the collator shifted are shifted again by the model (or never): the loss falls as ever, and the model generates garbage.",
    fix="Shift once: give the model unshifted labels, or shift_labels, or shift logits and labels in a loss of your own.",
    quiet="Distillation, label smoothing and masked language models, whose targets are none of these; rows of one repeated token.",
    threads=("huggingface/transformers#47395", "huggingface/transformers#46898", "LLM360/amber-train#6"),
    needs=("supervision",),
    judge=judge,
)
