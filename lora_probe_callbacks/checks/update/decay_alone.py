"""LP402: the adapter moves by weight decay alone."""

from __future__ import annotations

import numpy as np

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for tensors that move while their gradients are exactly zero."""
    if facts.update is None:
        return pending("no update was seen yet")
    history, slots, update = facts.history, facts.slots, facts.update
    zero = facts.intended & (history.zero > 0)
    silent = zero & ~history.had_signal
    if not silent.any():
        return ok()
    expected = np.nan_to_num(slots.rate * slots.weight_decay)
    moved = facts.intended & update.moved & (expected != 0.0)
    # B alone tells: while B is zero, A has no gradient in a healthy run and is decayed all the same.
    judged = moved & ~slots.of_role("A")
    decayed = judged & silent
    if not decayed.any() or (judged & ~decayed).any():
        return ok()
    row = int(history.zero[decayed].min())
    if row < PERSISTENT:
        return pending(f"the adapter moves and its gradients are exactly zero in {row} probed step(s)")
    first = int(np.flatnonzero(decayed)[0])
    shrink = update.size[first] / update.norm[first] if update.norm[first] else 0.0
    return fail(
        f"the adapter moves by weight decay alone: its gradients are exactly zero since the first step, {row} probed steps now",
        moved | zero,
        got=f"relative change {shrink:.2e} per step; learning rate times weight decay is {expected[first]:.2e}",
        expected="a change that follows a gradient",
    )


CHECK = Check(
    code="LP402",
    name="decay-alone",
    what="The adapter changes at every step although all its gradients are exactly zero: decoupled weight decay shrinks it towards the base model.",
    why="'Did the parameters change?' is answered with yes, at every step.",
    fix="Find out why the gradients are zero: all labels masked (-100), zero advantages, a factor of zero on the loss.",
    quiet="lora_A before B has moved; single batches without a signal.",
    threads=("unslothai/unsloth#5747", "unslothai/notebooks#270"),
    explained_by=("LP001", "LP102", "LP103", "LP104", "LP203", "LP502", "LP503"),
    needs=("owned",),
    judge=judge,
)
