"""LP001: batches of which no token is supervised."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, absent, fail, ok, pending, warn
from lora_probe_callbacks.facts import Facts

ENOUGH_STEPS, ENOUGH_ROWS = 8, 16  # before a fraction of them says something
HALF = 0.5


def judge(facts: Facts) -> Verdict:
    """Look for steps, and then for rows, without one supervised token."""
    step, totals = facts.supervision, facts.supervision_totals
    if step is None:
        return absent("the hidden states of no training forward were seen to receive a gradient")
    if not step.labelled:
        # An advantage of 0 sends no gradient either, and is healthy: without labels nothing tells them apart.
        if totals.empty_steps == totals.steps:
            return pending("the loss has sent no gradient to any position so far")
        often = totals.steps >= ENOUGH_STEPS and totals.empty_steps > HALF * totals.steps
        return _often(facts) if often else ok()
    if step.empty.all():
        lasting = totals.empty_in_a_row >= PERSISTENT
        often = totals.steps >= ENOUGH_STEPS and totals.empty_steps >= HALF * totals.steps
        message = (
            f"no token of this batch is supervised: all labels of its {len(step)} rows are -100, and it trains nothing"
        )
        got = f"{totals.empty_steps} of {totals.steps} probed steps without a supervised token"
        expected = "supervised tokens in every step"
        fix = _advice(bool(step.full.all()))
        if lasting or often:
            return fail(message, facts.intended, got=got, expected=expected, cause="batch", fix=fix)
        return warn(message, facts.intended, got=got, expected=expected, cause="batch", fix=fix)
    if totals.rows >= ENOUGH_ROWS and totals.empty_rows > HALF * totals.rows:
        return warn(
            f"{totals.empty_rows} of {totals.rows} rows have no supervised token, and train nothing",
            cause="rows",
            got=f"{totals.empty_rows} rows whose labels are all -100, {totals.empty_full} of them as long as their batch",
            expected="a supervised answer in nearly every row",
            fix=_advice(totals.empty_full > HALF * totals.empty_rows),
        )
    return ok()


def _often(facts: Facts) -> Verdict:
    totals = facts.supervision_totals
    return warn(
        f"in {totals.empty_steps} of {totals.steps} probed steps the loss sent a gradient of exactly zero to every position",
        facts.intended,
        cause="signal",
        got=f"{totals.empty_steps} steps that trained nothing",
        expected="a gradient in most steps",
        fix="print the labels or the loss mask of such a batch; if the weights of all its tokens are 0 by design (an advantage of 0), "
        "larger groups or other prompts give a signal",
    )


def _advice(cut: bool) -> str:
    if cut:
        return (
            "the rows fill the maximum length: the prompt took it all and the answer was cut off. Raise max_length, drop prompts that "
            "are too long, or truncate them from the left"
        )
    return "print a row's labels: check the response template or the mask that sets them to -100"


CHECK = Check(
    code="LP001",
    name="nothing-supervised",
    what="No token of a batch is supervised (all labels are -100): it warns at once, and fails after four such steps in a row or if half of the "
    "steps are like that. It warns too if most rows have none, or if most steps of a loss without labels send no gradient to any position.",
    why="The loss of such a batch is 0 or nan of an empty mean, its gradient zero: the optimizer steps, by momentum and weight decay.",
    fix="Look at the labels of one row as text. If rows end at the maximum length, the answers were cut off.",
    quiet="Single rows without an answer; losses without labels whose weights are zero for a while (GRPO with equal rewards).",
    threads=("huggingface/trl#6668", "huggingface/trl#6025", "huggingface/trl#6320", "unslothai/unsloth#2900"),
    needs=("supervision",),
    judge=judge,
)
