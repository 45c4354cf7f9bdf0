"""LP808: training moves a state that the saved adapter leaves out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lora_probe_callbacks.checks._base import Check, Verdict, absent, fail, ok, some, warn
from lora_probe_callbacks.facts import Facts, SavedFact


def judge(facts: Facts) -> Verdict:
    """Look for buffers and frozen parameters that have moved, in files and, before there is one, in the model."""
    adapters = [s for s in facts.saves if s.form == "adapter" and s.unreadable is None and s.why_not is None]
    for save in adapters:
        if save.unsaved:
            return dataclasses.replace(_file(save), seen=(save.step, save.framework_step))
    if facts.unsaved and not facts.saves_whole:
        return _live(facts)
    looked = adapters or (facts.moment == "step" and facts.ever_stepped)
    return ok() if looked else absent("no step was made yet")


def _live(facts: Facts) -> Verdict:
    return warn(
        f"training moves {_what(facts.unsaved)}: the file of the adapter will not hold it",
        cause="base",  # of LP404, which explains it where the frozen weights move as well
        got=f"{len(facts.unsaved)} frozen tensors that changed without an optimizer",
        expected="a base that stays as it is, or modules_to_save that name what changes",
        fix=_FIX + "; if whole checkpoints of the model are kept nothing is wrong",
    )


def _file(save: SavedFact) -> Verdict:
    words = f"the adapter {save.adapter!r} in {save.path} leaves out {_what(save.unsaved)}: loaded, it is another model"
    got = f"{len(save.unsaved)} tensors that training has moved are not in the file"
    expected = "in the file, or as they were when training began"
    if save.asked and not save.beside:
        return fail(words, cause="state", got=got, expected=expected, fix=_FIX)
    kept = (
        f"; {save.beside} beside it may hold them"
        if save.beside
        else "; if whole checkpoints are kept nothing is wrong"
    )
    return warn(words, cause="state", got=got, expected=expected, fix=_FIX + kept)


def _what(moved: Sequence[tuple[str, float]]) -> str:
    names = [name for name, _ in sorted(moved, key=lambda pair: -pair[1])]
    most = max(change for _, change in moved)
    by = "from zero" if most == float("inf") else f"by up to {most:.0%}"
    return f"{len(moved)} tensors that no optimizer holds, moved {by}: {some(names)}"


_FIX = (
    "keep these modules in eval mode (norms with running statistics), name them in modules_to_save, or save their state beside "
    "the adapter and load both"
)

CHECK = Check(
    code="LP808",
    name="unsaved-state",
    what="Buffers or small frozen parameters of the base change in training without an optimizer (running statistics, a router's bias, a quantiser's "
    "scales), and the adapter's file holds none of them. It warns when they move; check_saved() fails.",
    why="The adapter is complete and the base is the published one, and together they are not the model that was trained and evaluated.",
    fix=_FIX[0].upper() + _FIX[1:] + ".",
    quiet="Modules in modules_to_save; checkpoints of a whole module; counters, single numbers, buffers that are not saved with a model, caches; a base that stays.",
    threads=("huggingface/peft#1732",),
    explained_by=("LP404",),
    needs=("files",),
    judge=judge,
)
