"""LP004: no answer is taught to end."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, absent, ok, pending, warn
from lora_probe_callbacks.facts import Facts

ENOUGH_CUT = 8  # stop tokens that were left out directly behind an answer
ENOUGH_ROWS = 32  # rows with a prompt and an answer that ends before its batch does


def judge(facts: Facts) -> Verdict:
    """Look for answers whose stop token is never among the targets."""
    step, totals = facts.supervision, facts.supervision_totals
    if step is None or not step.causal:
        return absent("no causal language model was seen to train")
    if not facts.stop_tokens:
        return absent("no stop token is known")
    if totals.stops:
        return ok()
    name = f"token {facts.stop_tokens[0]}"
    if totals.cut_stops >= ENOUGH_CUT:
        return _verdict(
            f"a stop token (such as {name}) stands behind {totals.cut_stops} answers, and is a target of none",
            got=f"{totals.cut_stops} stop tokens without a gradient directly behind supervised tokens, and 0 with one",
        )
    # Plain text has no stop tokens: only where there are prompts, and a tokenizer to say what ends an answer.
    answers = min(totals.prompts, totals.endings)
    if facts.has_tokenizer and answers >= ENOUGH_ROWS:
        return _verdict(
            f"none of the {answers} answers seen so far ends with a stop token (such as {name})",
            got=f"{totals.supervised} supervised tokens, and no stop token among them",
        )
    return pending("no stop token was among the targets so far; too few answers were seen to tell")


def _verdict(message: str, got: str) -> Verdict:
    return warn(
        f"{message}: the model does not learn to stop",
        got=got,
        expected="a stop token at the end of each answer",
        fix="append tokenizer.eos_token to the answers, and use another token for padding than for the end: a collator that masks "
        "every pad_token_id masks the end too. If the model should go on for ever, ignore LP004",
    )


CHECK = Check(
    code="LP004",
    name="missing-stop-token",
    what="Stop tokens stand behind the answers and are left out of the loss, or never occur at the end of 32 answers. It warns.",
    why="With pad_token = eos_token a collator sets all of them to -100; the loss is fine, and generation never ends.",
    fix="Give padding a token of its own, and end each answer with the stop token.",
    quiet="Plain text without prompts; rows that fill the width of their batch; rows whose stop token lies in the padding; other special tokens that end a turn of a chat.",
    threads=("mlabonne/llm-course#33", "huggingface/trl#1623", "huggingface/trl#6357"),
    needs=("supervision",),
    judge=judge,
)
