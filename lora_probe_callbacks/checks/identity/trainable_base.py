"""LP206: a base weight that carries an adapter is trainable."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, some
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for adapted layers whose base weight requires gradients."""
    if not facts.trainable_bases:
        return ok()
    return fail(
        f"the base weights of {len(facts.trainable_bases)} adapted layers are trainable: {some(facts.trainable_bases)}; what they "
        "learn is not in the adapter file",
        got=f"{len(facts.trainable_bases)} base weights with requires_grad=True",
        expected="0",
    )


CHECK = Check(
    code="LP206",
    name="trainable-base",
    what="A weight under an adapter requires gradients.",
    why="The run is a full fine-tune in disguise: the loss falls, the adapter file holds a part of what was learned, and the rest is "
    "lost on save.",
    fix="Freeze the base: model.requires_grad_(False) before the adapter is attached, and nothing like requires_grad_(True) after.",
    quiet="Unfrozen norms, embeddings, biases and heads, which carry no adapter; a weight that is tied to one of them.",
    threads=("huggingface/sentence-transformers#3274", "Blaizzy/mlx-vlm#2181"),
    judge=judge,
)
