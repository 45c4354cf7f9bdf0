"""LP803: the restored adapter is not the saved one."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, absent, fail, ok, skipped, some
from lora_probe_callbacks.checks.checkpoints._saves import Values, values_of
from lora_probe_callbacks.facts import Facts, SavedFact

_FIX = (
    "load the adapter before training starts and do not wrap the model again afterwards; look at what the load returns: "
    "set_peft_model_state_dict and load_state_dict(strict=False) name what they did not find and raise nothing"
)

_OTHERS: tuple[Values, ...] = ("fresh", "untrained", "unrelated", "related", "start")


def judge(facts: Facts) -> Verdict:
    """Compare the adapter that starts with the one that was saved."""
    for save in facts.saves:
        if save.before_steps and (values := values_of(save)) in _OTHERS:
            return _file(save, values)
    resumed = facts.restored
    if resumed is None:
        if any(save.before_steps and values_of(save) == "equal" for save in facts.saves):
            return ok()
        return absent("no saved state was restored")
    if resumed.fresh:
        return fail(
            f"the run goes on from {resumed.source}, and its adapter is fresh: every B is exactly zero, and was not when it was saved",
            facts.intended,
            cause="fresh",
            got="B = 0 in all layers",
            expected="the adapter that was saved",
            fix=_FIX,
        )
    if not resumed.known:
        return skipped(
            f"no tensor of the adapter in {resumed.source} has a name in this model, or this rank holds parts only"
        )
    if resumed.differing:
        names = facts.slots.names(resumed.differing)
        return fail(
            f"the run goes on from {resumed.source}, and {len(names)} of {len(resumed.known)} adapter tensors are not as they were saved: {some(names)}",
            resumed.differing,
            cause="values",
            got=f"{len(names)} tensors with other values",
            expected="the values of the checkpoint",
            fix=_FIX,
        )
    if resumed.unknown:
        return fail(
            f"{resumed.unknown} adapter tensors in {resumed.source} have no place in this model",
            facts.intended,
            cause="names",
            got=f"{len(resumed.known)} tensors found again",
            expected=f"{len(resumed.known) + resumed.unknown}",
            fix="build the model and the adapter as they were when the checkpoint was written: targets, rank, names of the modules",
        )
    return ok()


def _file(save: SavedFact, values: Values | None) -> Verdict:
    words: dict[Values | None, str] = {
        "fresh": "the live adapter is fresh: every B is exactly zero, and in the file it is not",
        "untrained": "every B in the file is zero, and in the model it is not",
    }
    return fail(
        f"the adapter {save.adapter!r} in the model is not the one in {save.path}: "
        + words.get(values, "no step was made yet, and their values differ"),
        save.slots,
        cause="file",
        got=f"relative distance {save.apart:.2g}" if save.apart != float("inf") else "B = 0 in the model",
        expected="the values of the file",
        fix=_FIX,
    )


CHECK = Check(
    code="LP803",
    name="restored-adapter-differs",
    what="A run that goes on from a checkpoint starts with another adapter than was saved: a fresh one, one of another time, or one in which some tensors were not "
    "found. The probe's own state in the checkpoint holds a fingerprint of every adapter tensor.",
    why="A load by name skips what it does not find, and a script that wraps the model anew discards what it loaded. The step counter goes on and the loss "
    "starts where it began.",
    fix=_FIX[0].upper() + _FIX[1:] + ".",
    quiet="Another precision than at the time of the save; other wrappers (compiled, data parallel); shards, of which no fingerprint is taken; checkpoints without the "
    "probe's state.",
    threads=(
        "huggingface/lerobot#3459",
        "tloen/alpaca-lora#359",
        "huggingface/transformers#24252",
        "illuin-tech/colpali#424",
        "huggingface/peft#1932",
        "Lightning-AI/pytorch-lightning#19281",
        "huggingface/peft#793",
        "MakazhanAlpamys/Soup#351",
    ),
    needs=("files",),
    judge=judge,
)
