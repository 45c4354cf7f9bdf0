"""LP402: the adapter moves by weight decay alone."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for tensors that move while their gradients are exactly zero."""
    if not facts.moves:
        return pending("no update was seen yet")
    silent = {i for i in facts.intended if facts.history[i].zero and not facts.history[i].had_signal}
    if not silent:
        return ok()
    moved = {
        i: rate * decay
        for i in sorted(facts.intended)
        if (move := facts.moves[i]) is not None
        and move.moved
        and (decay := facts.slots[i].weight_decay)
        and (rate := facts.rates[i])
    }
    # B alone tells: while B is zero, A has no gradient in a healthy run and is decayed all the same.
    judged = [i for i in moved if facts.slots[i].role != "A"]
    decayed = [i for i in judged if i in silent]
    if not decayed or len(decayed) < len(judged):
        return ok()
    row = min(facts.history[i].zero for i in decayed)
    if row < PERSISTENT:
        return pending(f"the adapter moves and its gradients are exactly zero in {row} probed step(s)")
    first = decayed[0]
    size, norm = facts.update.sizes[first], facts.update.norms[first]  # type: ignore[union-attr]  # moves are its kinds
    shrink = size / norm if norm else 0.0  # type: ignore[operator]
    return fail(
        f"the adapter moves by weight decay alone: its gradients are exactly zero since the first step, {row} probed steps now",
        [*moved, *(i for i in facts.intended if facts.history[i].zero)],
        got=f"relative change {shrink:.2e} per step; learning rate times weight decay is {moved[first]:.2e}",
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
    explained_by=("LP102", "LP103", "LP104", "LP203", "LP502", "LP503"),
    judge=judge,
)
