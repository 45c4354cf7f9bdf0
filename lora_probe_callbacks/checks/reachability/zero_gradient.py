"""LP303: the gradient is exactly zero, and stays so."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, some, warn
from lora_probe_callbacks.facts import Bools, Facts, count

# A part of an adapter may stand at exactly zero for a while (an expert that the router avoids, a rare token): judged
# over this many probed steps.
LONG = 4 * PERSISTENT
RARE_STEPS = 100


def judge(facts: Facts) -> Verdict:
    """Look for gradients that are there and exactly zero in every probed step."""
    history = facts.history
    present = facts.intended & facts.gradients.present
    if not present.any():
        return pending("no gradient was read at this decision")
    # While every B is zero, every A gradient is zero in a healthy run: a first step shows B alone.
    b = present & ~facts.slots.of_role("A")
    judged = b if b.any() else present
    zero = judged & (history.zero > 0)
    if not zero.any():
        stuck = present & _long(facts)
        return _part(facts, stuck) if stuck.any() else ok()
    if count(zero) == count(judged):
        return _all(facts, present, judged)
    long = zero & _long(facts)
    if long.any():
        return _part(facts, long)
    return pending(f"{count(zero)} gradients are exactly zero so far: {some(facts.slots.names(zero))}")


def _long(facts: Facts) -> Bools:
    # A rare token may not occur for longer than that.
    rare = facts.slots.rows & (facts.step - facts.history.zero_since < RARE_STEPS)
    long: Bools = (facts.history.zero >= LONG) & ~rare & ~facts.pruned
    return long


def _all(facts: Facts, present: Bools, judged: Bools) -> Verdict:
    row = int(facts.history.zero[judged].min())
    got, expected = f"{count(present)} gradients, each exactly 0, in {row} probed steps in a row", "a gradient"
    if row < PERSISTENT:
        return pending(f"every gradient is exactly zero in {row} probed step(s): a batch without a signal is healthy")
    if not facts.history.had_signal[judged].any():
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


def _part(facts: Facts, slots: Bools) -> Verdict:
    since = int(facts.history.zero_since[slots].max())
    return warn(
        f"the gradients of {count(slots)} adapter tensors are exactly zero in every probed step since step {since}: "
        f"{some(facts.slots.names(slots))}",
        slots,
        got="exactly 0",
        expected="a gradient, unless no input reaches them",
        fix="if their inputs were absent so far (an expert, a modality, a token) nothing is wrong; else look for a mask or a factor of zero",
    )


CHECK = Check(
    code="LP303",
    name="zero-gradient",
    what="Every adapter gradient is exactly zero in every probed step since the start, four at least. It warns if that holds of a part over 16 probed steps (of rows of a table over 100).",
    why="All labels masked, every advantage zero, a loss multiplied by zero: the loss is printed, backward() succeeds, Adam does nothing.",
    fix="Look at the labels (all -100?), the advantages and the factors of the loss.",
    quiet="lora_A before B has moved; batches without a signal among others; after a signal was seen it only warns.",
    threads=("modelscope/ms-swift#4547", "unslothai/unsloth#5747"),
    explained_by=("LP001", "LP102", "LP103", "LP104", "LP110", "LP203", "LP308", "LP402", "LP502", "LP503"),
    needs=("owned",),
    sets_ranks_apart=True,
    judge=judge,
)
