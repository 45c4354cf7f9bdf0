"""LP607: one of two tied tables is trained as a copy of its own."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, ok, pending, warn
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for tied embeddings and heads of which one alone is trained."""
    if facts.coverage is None:
        return pending("no training forward has begun")
    if not facts.coverage.untied:
        return ok()
    trained, stays = facts.coverage.untied[0]
    return warn(
        f"{trained} is trained as a copy of its own, and {stays}, which is tied to it in the base model, stays as it is",
        cause="tie",
        got="one of two tied tables in modules_to_save",
        expected="both, and tied, or neither",
        fix="pass ensure_weight_tying=True in the LoraConfig, so that both train as one; if they are meant to part, set "
        "config.tie_word_embeddings=False before the model is saved merged, else the next load ties them again and loses the copy",
    )


CHECK = Check(
    code="LP607",
    name="untied-copy",
    what="Embedding and head are one weight in the base model, and modules_to_save trains a copy of one of them. It warns.",
    why="The copy learns and the other stays. config.tie_word_embeddings is still True: a merged model that is saved and loaded again has one of "
    "the two for both.",
    fix="ensure_weight_tying=True, or both in modules_to_save with the tie taken out of the configuration.",
    quiet="Tied tables with LoRA or trainable_token_indices; both in modules_to_save; models whose tables are not tied.",
    threads=("huggingface/peft#2777", "huggingface/peft#2864", "huggingface/transformers#45127"),
    needs=("coverage",),
    judge=judge,
)
