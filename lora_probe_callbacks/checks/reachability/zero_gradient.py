"""LP303: the gradient is exactly zero, and stays so."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, some, warn
from lora_probe_callbacks.facts import Facts

# A part of an adapter may stand at exactly zero for long (an expert that the router avoids, a rare token):
# judged over this many probed steps and this many steps.
LONG, LONG_STEPS = 4 * PERSISTENT, 100


def judge(facts: Facts) -> Verdict:
    """Look for gradients that are there and exactly zero in every probed step."""
    read = [i for i in sorted(facts.intended) if facts.gradients and facts.gradients[i] is not None]
    present = [i for i in read if facts.gradients[i].present]  # type: ignore[union-attr]
    if not present:
        return pending("no gradient was read at this decision")
    # While every B is zero, every A gradient is zero in a healthy run: a first step shows B alone.
    judged = [i for i in present if facts.slots[i].role != "A"] or present
    zero = [i for i in judged if facts.history[i].zero]
    if not zero:
        stuck = [i for i in present if _long(facts, i)]
        return _part(facts, stuck) if stuck else ok()
    row = min(facts.history[i].zero for i in zero)
    if len(zero) == len(judged):
        got, expected = (
            f"{len(present)} gradients, each exactly 0, in {row} probed steps in a row",
            "a gradient",
        )
        if row < PERSISTENT:
            return pending(
                f"every gradient is exactly zero in {row} probed step(s): a batch without a signal is healthy"
            )
        if not any(facts.history[i].had_signal for i in judged):
            return fail(
                f"every adapter gradient is exactly zero since the first step, {row} probed steps now",
                present,
                got=got,
                expected=expected,
            )
        return warn(
            f"every adapter gradient is exactly zero in {row} probed steps in a row",
            present,
            fix="if the batches carried no signal (equal rewards, masked labels) nothing is wrong with the adapter: look at them",
            got=got,
            expected=expected,
        )
    long = [i for i in zero if _long(facts, i)]
    return (
        _part(facts, long)
        if long
        else pending(f"{len(zero)} gradients are exactly zero so far: {some([facts.slots[i].name for i in zero])}")
    )


def _long(facts: Facts, slot: int) -> bool:
    history = facts.history[slot]
    return history.zero >= LONG and facts.step - history.zero_since >= LONG_STEPS


def _part(facts: Facts, slots: list[int]) -> Verdict:
    since = max(facts.history[i].zero_since for i in slots)
    return warn(
        f"the gradients of {len(slots)} adapter tensors are exactly zero in every probed step since step {since}: "
        f"{some([facts.slots[i].name for i in slots])}",
        slots,
        got="exactly 0",
        expected="a gradient, unless no input reaches them",
        fix="if their inputs were absent so far (an expert, a modality, a token) nothing is wrong; else look for a mask or a factor of zero",
    )


CHECK = Check(
    code="LP303",
    name="zero-gradient",
    what="Every adapter gradient is exactly zero in every probed step since the start, four at least.",
    why="All labels masked, every advantage zero, a loss multiplied by zero: the loss is printed, backward() succeeds, Adam does nothing.",
    fix="Look at the labels (all -100?), the advantages and the factors of the loss.",
    quiet="lora_A before B has moved; batches without a signal among others; after a signal was seen it only warns.",
    threads=("modelscope/ms-swift#4547", "unslothai/unsloth#5747"),
    explained_by=("LP102", "LP103", "LP104", "LP203", "LP308", "LP402", "LP502", "LP503"),
    judge=judge,
)
