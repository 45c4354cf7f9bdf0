"""LP807: a saved file cannot be read."""

from __future__ import annotations

import dataclasses

from lora_probe_callbacks.checks._base import Check, Verdict, absent, fail, ok, skipped, warn
from lora_probe_callbacks.facts import Facts, SavedFact


def judge(facts: Facts) -> Verdict:
    """Was every saved file complete?"""
    if not facts.saves:
        return absent("nothing was saved yet")
    for save in facts.saves:
        if save.unreadable is not None:
            return dataclasses.replace(_verdict(save), seen=(save.step, save.framework_step))
    why_not = next((f"{save.path}: {save.why_not}" for save in facts.saves if save.why_not is not None), None)
    return ok() if any(save.why_not is None for save in facts.saves) else skipped(why_not or "")


def _verdict(save: SavedFact) -> Verdict:
    words = f"{save.path} cannot be read: {save.unreadable}"
    got, expected, fix = (
        str(save.unreadable),
        "a complete file",
        "look at the free space of the disk and write the file again",
    )
    if save.final:
        return fail(words, got=got, expected=expected, fix=fix)
    return warn(
        words, got=got, expected=expected, fix=f"{fix}; if it is still being written, check_saved(path) tells later"
    )


CHECK = Check(
    code="LP807",
    name="unreadable-checkpoint",
    what="A saved file is damaged, cut short or only half written. While training goes on it is looked at again at a later step, and then warned of; a file that is "
    "checked by hand after training fails.",
    why="A full disk, a killed writer or a file system with a delay leaves a file of the right name. Nobody opens it before it is needed.",
    fix="Write the file again.",
    quiet="A file that somebody still writes to; one that was deleted meanwhile, as rotated checkpoints are. Bytes that were changed within a tensor are LP801's.",
    threads=("Comfy-Org/ComfyUI#6744", "Comfy-Org/ComfyUI#15602", "lyogavin/airllm#137"),
    needs=("files",),
    judge=judge,
)
