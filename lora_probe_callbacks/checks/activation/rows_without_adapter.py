"""LP110: rows of the batch run without the adapter, for its invocation tokens are not in them."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, absent, fail, ok, pending, warn
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for rows in which aLoRA found no invocation tokens."""
    forwards = facts.training_forwards
    if not forwards:
        return pending(facts.unobservable or "no training forward was seen in this step")
    rows = [(on, total) for f in forwards for _, on, total in f.rows if total]
    if not rows:
        return absent("no adapter is switched by row")
    off = sum(f.without_token for f in forwards)
    if not off:
        return ok()
    on, total = sum(on for on, _ in rows), sum(total for _, total in rows)
    zero = facts.history.zero[facts.intended]
    dead = not on and bool(zero.size) and int(zero.min()) >= PERSISTENT
    report = fail if dead else warn
    return report(
        f"aLoRA's invocation tokens are missing in {total - on} of {total} rows of the batch: these rows run through the base model alone "
        "and train nothing",
        facts.intended if dead else (),
        got=f"invocation tokens in {on} of {total} rows",
        expected="in every row that should train",
        fix="compare alora_invocation_tokens with the token ids of a batch: a chat template, a tokenizer or a truncation may have changed or cut "
        "them; if rows without them are meant to be in the data nothing is wrong",
    )


CHECK = Check(
    code="LP110",
    name="rows-without-adapter",
    what="Rows of a training batch hold none of aLoRA's invocation tokens. It warns, and fails if no row has them and no gradient is other than zero, four probed steps in a row.",
    why="An activated LoRA acts from its invocation tokens on. In a row without them it is off, without a word, and the other rows learn.",
    fix="See that the invocation tokens are in every sample, as the tokenizer writes them there.",
    quiet="Batches whose rows name their adapters (adapter_names): which rows are for the base model is written there, and the proof of "
    "'active' says how many.",
    threads=("huggingface/peft#2609",),
    explained_by=("LP101", "LP102", "LP103"),
    judge=judge,
)
