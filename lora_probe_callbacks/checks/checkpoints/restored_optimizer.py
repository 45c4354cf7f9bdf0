"""LP804: the optimizer's state was restored to the wrong tensors, or not at all."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, absent, fail, ok, skipped, some, warn
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Compare the optimizer's state of every adapter tensor with what was saved under its name."""
    resumed = facts.restored
    if resumed is None:
        return absent("no saved state was restored")
    if not resumed.optimizer:
        return skipped(f"{resumed.source} tells of no optimizer state")
    total = len(resumed.optimizer)
    if resumed.wrong:
        slot, owner = resumed.wrong[0]
        swapped = (
            f"{facts.slots.name[slot]} has that of {owner}"
            if owner
            else some([facts.slots.name[i] for i, _ in resumed.wrong])
        )
        return fail(
            f"the optimizer's state of {len(resumed.wrong)} of {total} adapter tensors is not theirs: {swapped}",
            [i for i, _ in resumed.wrong],
            cause="state",
            got=f"{len(resumed.wrong)} states that differ from those saved under the same names",
            expected="0",
            fix="give the optimizer its parameters in the order they had when it was saved: load_state_dict goes by position, not by name",
        )
    if resumed.lost:
        some_only = f"{len(resumed.lost)} of {total}"
        if resumed.whole or len(resumed.lost) < total:
            return fail(
                f"the optimizer holds no state for {some_only} adapter tensors, and did when {resumed.source} was written",
                resumed.lost,
                cause="lost",
                got="no state",
                expected=f"state of {total} tensors",
                fix="load the optimizer's state after the optimizer was built on the tensors that train, and before training starts",
            )
        return warn(
            f"the optimizer starts without the state that it had when {resumed.source} was written",
            resumed.lost,
            cause="lost",
            got=f"no state for {some_only} adapter tensors",
            expected="the saved state",
            fix="load its state dict beside the adapter; if a fresh optimizer is meant, pass ignore=('LP804',)",
        )
    if resumed.rates:
        return fail(
            f"{len(resumed.rates)} adapter tensors have learning rates that were others' when {resumed.source} was written: "
            f"{some(facts.slots.names(resumed.rates))}",
            resumed.rates,
            cause="groups",
            got="the rates of other parameter groups",
            expected="each tensor's own",
            fix="build the parameter groups in the order they had when the optimizer was saved: load_state_dict goes by position",
        )
    return ok()


CHECK = Check(
    code="LP804",
    name="restored-optimizer-state",
    what="After a resume the optimizer's state of an adapter tensor is another tensor's, nobody's, or missing. The probe's own state in the checkpoint holds it by name (a few elements; of more than 128 tensors of some).",
    why="torch restores optimizers by position: parameters in another order get each other's moments, and tensors of one shape never raise. A loader that meets an "
    "optimizer without state restores nothing, as silently.",
    fix="Build the optimizer on the same parameters in the same order, and load its state before the first step.",
    quiet="Optimizers without state; checkpoints that leave the optimizer out by intent; changed learning rates and schedules. A fresh optimizer in a loop that restores "
    "by hand is warned of only.",
    threads=("huggingface/peft#859", "NVIDIA-NeMo/labs-molt#57", "princeton-nlp/LESS#4"),
    explained_by=("LP803", "LP201", "LP202"),
    needs=("resume",),
    judge=judge,
)
