"""LP208: the learning rate is exactly 0, and stays there."""

from __future__ import annotations

import numpy as np

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, some, warn
from lora_probe_callbacks.facts import Facts, count


def judge(facts: Facts) -> Verdict:
    """Look for adapter tensors whose learning rate is 0 in every probed step."""
    history = facts.history
    owned = facts.intended & facts.slots.owned
    if not owned.any():
        return pending("no optimizer owns the adapter")
    zero = owned & (history.rate_zero > 0)
    if not zero.any():
        return ok() if history.had_rate[owned].any() else pending("no step was seen yet")
    long = owned & (history.rate_zero >= PERSISTENT)
    if not long.any():
        row = int(history.rate_zero[zero].max())
        return pending(f"the learning rate is 0 in {row} probed step(s): a warm-up may begin so")
    row = int(history.rate_zero[np.flatnonzero(long)[0]])
    whole = count(long) == count(owned)
    got, expected = f"lr = 0.0 in {row} probed steps in a row", "lr > 0 after the warm-up"
    if whole and not history.had_rate[long].any():
        return fail(
            f"the learning rate is exactly 0 since the first step, {row} probed steps now",
            long,
            got=got,
            expected=expected,
        )
    which = "of all adapter tensors" if whole else f"of {some(facts.slots.names(long))}"
    return warn(
        f"the learning rate {which} is exactly 0 for {row} probed steps in a row",
        long,
        fix="if the schedule is meant to end or pause here nothing is wrong; else look at its length in optimizer steps",
        got=got,
        expected=expected,
    )


CHECK = Check(
    code="LP208",
    name="zero-learning-rate",
    what="The learning rate of the adapter's parameter groups is exactly 0 in every probed step since the start, four at least.",
    why="Gradients are right and the loss is printed; a scheduler that is never stepped, or two of them, leave the rate at 0.",
    fix="Call scheduler.step() after optimizer.step(), and check the number of warm-up steps against the number of optimizer steps.",
    quiet="A warm-up that begins at 0. After a rate above 0 was seen it only warns.",
    threads=("huggingface/transformers#33086", "lm-sys/FastChat#2558", "modelscope/ms-swift#6009"),
    explained_by=("LP201", "LP202", "LP203"),
    needs=("owned",),
    judge=judge,
)
