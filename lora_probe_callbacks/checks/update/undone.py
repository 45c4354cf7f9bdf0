"""LP409: something else than the optimizer takes the steps back."""

from __future__ import annotations

import numpy as np

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped, some, warn
from lora_probe_callbacks.checks.update._undone import begin_alike, undone_slots
from lora_probe_callbacks.facts import Bools, Facts, count

MOSTLY = 15  # three times
WHOLE = 0.9  # of the tensors of an adapter that had gone somewhere


def judge(facts: Facts) -> Verdict:
    """Look for tensors that are brought back again and again to where their way began."""
    path = facts.path
    if not (path.end_step >= 0).any():
        return pending("no step was followed by another one that was looked at")
    undone = undone_slots(facts)
    if undone.any() and begin_alike(facts, undone):
        return skipped("explained by LP401")
    if undone.any():
        return _verdict(facts, undone, certain=_whole(facts, undone))
    partly = facts.intended & (path.partly >= MOSTLY)
    return _verdict(facts, partly, certain=False) if partly.any() else ok()


def _whole(facts: Facts, undone: Bools) -> bool:
    """Nearly all of one adapter that had gone somewhere, or of its B."""
    slots = facts.slots
    for name in sorted({slots.adapter[i] for i in np.flatnonzero(undone)}):
        mine = slots.of_adapter(name) & facts.intended & (facts.path.under_way | undone)
        b = mine & slots.of_role("B")  # without it A adds nothing
        if any(part.any() and count(part & undone) >= WHOLE * count(part) for part in (mine, b)):
            return True
    return False


def _verdict(facts: Facts, slots: Bools, *, certain: bool) -> Verdict:
    path = facts.path
    first, last = path.seen or (0, 0)
    part, steps = float(np.nanmedian(path.fraction[slots])), int(np.median(path.way[slots]))
    times, number = int(path.times[slots].max()), count(slots)
    report = fail if certain else warn
    return report(
        f"what the steps do is taken back: between the end of step {first} and the update of step {last} {part:.0%} of the way of "
        f"{steps} step{'s'[: steps != 1]} was undone in {number} of {count(facts.intended)} adapter tensors, the {_nth(times)} time in a "
        f"row: {some(facts.slots.names(slots))}",
        slots,
        got=f"{part:.1%} of the way undone by something that is no step of the optimizer",
        expected="the values that the last step wrote",
        fix="look for what writes to the adapter between two steps: averaged weights that are copied in for a validation and never put "
        "back, load_state_dict() of an old state, a reset or a restart that does not merge, values sent from a stale copy",
    )


def _nth(times: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(times, f"{times}th")


CHECK = Check(
    code="LP409",
    name="steps-undone",
    what="Something else than the optimizer writes to the adapter between two steps and brings it back to where it stood after the last such write, or to a product BA "
    "of zero that was not merged into the base, twice in a row. It fails if 90% of the way of nearly all tensors of an adapter is undone, "
    "and warns of a part of them, or of 70% in three writes.",
    why="The loss is printed, every step moves the adapter, and after a thousand steps it is where it was after the first few.",
    fix="Keep the trained values aside and put them back after a validation with averaged ones; merge before a restart; load a state once.",
    quiet="Averages that are swapped out again; one rollback; restarts that merge into the base (ReLoRA); slow weights (Lookahead, Reptile); SAM; bounds on norms and "
    "values; pruning by AdaLoRA. Between two probed steps that do not follow each other only a return to the very start of the way "
    "is seen; what falls directly before or after a probed step is.",
    threads=(
        "PKU-YuanGroup/Open-Sora-Plan#186",
        "atomistic-machine-learning/schnetpack#785",
        "MakazhanAlpamys/Soup#693",
    ),
    explained_by=("LP202", "LP401", "LP407", "LP501", "LP503"),
    needs=("owned",),
    judge=judge,
)
