"""LP003: tokens that the batch's own mask leaves out are trained on."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, absent, fail, ok
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for supervised tokens outside the completion mask or the assistant mask."""
    step = facts.supervision
    if step is None or not step.causal:
        return absent("no causal language model was seen to train")
    outside, supervised = int(step.masked.sum()), int(step.supervised.sum())
    if not outside:
        return ok()
    return fail(
        f"the prompt is supervised: {outside} of the {supervised} tokens that this step trains on lie outside the batch's completion or assistant mask",
        facts.intended,
        got=f"a gradient at {outside} positions that the mask leaves out, in {int((step.masked > 0).sum())} of {len(step)} rows",
        expected="a gradient at the tokens of the mask alone",
    )


CHECK = Check(
    code="LP003",
    name="supervised-prompt",
    what="The forward was given a completion_mask, assistant_masks or response_mask, and the loss reaches tokens outside it.",
    why="The mask is made and never applied: the model learns to write prompts, and the loss looks better than it is.",
    fix="Apply the mask to the labels (labels[mask == 0] = -100) or to the loss; in TRL set completion_only_loss or assistant_only_loss.",
    quiet="Batches without such a mask: training on all tokens is then what was meant.",
    threads=("MervinPraison/PraisonAI#4358", "QwenLM/Qwen3-ASR#212"),
    needs=("supervision",),
    judge=judge,
)
