"""LP805: what was trained or resized beside the adapter is not in the file."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, some, warn
from lora_probe_callbacks.checks.checkpoints._saves import each_save
from lora_probe_callbacks.facts import Facts, SavedFact


def judge(facts: Facts) -> Verdict:
    """Look for embeddings and other tensors that an adapter file leaves behind."""
    return each_save(facts, _judge)


def _judge(save: SavedFact) -> Verdict | None:
    if save.form != "adapter":
        return None
    lost = [name for name, kind in save.left_out if kind == "trained embedding"]
    resized = [name for name, kind in save.left_out if kind == "resized embedding"]
    others = [name for name, kind in save.left_out if kind == "trained"]
    if lost or resized:
        names, what = (lost, "trained") if lost else (resized, "resized")
        report = warn if save.beside else fail
        return report(
            f"{what} embeddings are not in {save.path}: {some(names)}",
            cause=what,
            got=f"{len(names)} {what} embedding(s) left out"
            + (f"; {save.beside} may hold them" if save.beside else ""),
            expected="in the file, or in modules_to_save",
            fix="name them in modules_to_save (or trainable_token_indices) of the LoraConfig, or pass save_embedding_layers=True to save_pretrained",
        )
    if others:
        return warn(
            f"{len(others)} trained tensors beside the adapter are not in {save.path}: {some(others)}",
            cause="other",
            got=f"{len(others)} trained tensors left out",
            expected="in the file, or in modules_to_save",
            fix="name their modules in modules_to_save of the LoraConfig; if they are saved elsewhere, pass ignore=('LP805',)",
        )
    return ok()


CHECK = Check(
    code="LP805",
    name="saved-without-embeddings",
    what="An adapter file leaves out embeddings that were trained or resized, or other tensors that the optimizer trains in the base model.",
    why="An adapter file holds the adapter alone. Embeddings that were unfrozen, or enlarged for new tokens, stay behind: a reload puts the adapter on the old rows.",
    fix="Name them in modules_to_save, or save them with save_embedding_layers=True.",
    quiet="Frozen embeddings; modules_to_save and trainable_token_indices; tied embeddings that are in the file under one of their names; checkpoints of a whole "
    "module. A second file of weights beside it makes it a warning. Whether a vocabulary was resized is known where the base's config.json is on this disk.",
    threads=("huggingface/peft#1300", "huggingface/peft#1457", "huggingface/sentence-transformers#3274"),
    explained_by=("LP206",),
    needs=("files",),
    judge=judge,
)
