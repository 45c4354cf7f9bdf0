"""LP405: the forward does not see the parameters."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Report a forward whose outputs differ from those of a repeat that reads the parameters afresh."""
    if facts.stale_forward is None:
        reason = facts.why_not_repeated
        return skipped(reason) if reason else pending("no forward was repeated yet")
    stale, comparison = facts.stale_forward
    if not stale:
        return ok()
    return fail(
        "the forward does not see the present parameters: a repeat without the autocast cache gives other outputs",
        facts.intended,
        got=comparison,
        expected="bit-equal outputs",
    )


CHECK = Check(
    code="LP405",
    name="stale-forward",
    what="Directly after a training forward it is run again, with the same random numbers and without autocast's cache of cast weights: the outputs must be "
    "bit-equal. Done in the first four steps, and rarely after.",
    why="One autocast block around several steps keeps serving the 16-bit copies of step 0: parameters move, gradients are finite, and the loss never changes.",
    fix="Enter autocast anew in every iteration, around the forward only, or pass cache_enabled=False.",
    quiet="Models whose repeats differ from each other (skipped), an autocast block per iteration.",
    threads=("X-GenGroup/Flow-Factory#186", "pytorch/pytorch#105211"),
    needs=("replay",),
    judge=judge,
)
