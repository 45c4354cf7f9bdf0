"""LP301: the graph of the loss does not lead to the adapter."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, ok, pending, skipped
from lora_probe_callbacks.checks.reachability._missing import judge_missing, unreached
from lora_probe_callbacks.facts import Facts, count


def judge(facts: Facts) -> Verdict:
    """Look for tensors that the graph of no training forward leads to."""
    forwards = facts.training_forwards
    if not forwards:
        return pending(facts.unobservable or "no training forward was seen in this step")
    unknown = [f.why_unknown for f in forwards if f.reached is None and f.why_unknown]
    lost = unreached(facts)
    if lost is None:
        return skipped(unknown[0] if unknown else "the graph was not walked in this step")
    if not lost.any():
        return ok()
    if not any(f.received for f in forwards) and facts.moment != "exception":
        if facts.backward_called is False:
            return judge_missing(
                facts,
                lost,
                "{who} got no gradient: no backward was called in this step",
                got="0 backward passes between the forward and optimizer.step()",
                expected="loss.backward() before optimizer.step()",
                fix="call loss.backward() (accelerator.backward(loss), self.manual_backward(loss)) after the forward of every step; see under "
                "which condition it is called, and whether an exception on the way is swallowed",
            )
        return judge_missing(
            facts,
            lost,
            "the loss does not depend on {who}: no gradient arrived at the output of the forward",
            got=f"0 gradients at the output of {forwards[0].module}",
            expected="the loss made from that output",
        )
    return judge_missing(
        facts,
        lost,
        "the loss does not depend on {who}: the graph of its forward does not lead there",
        got=f"{count(facts.intended & ~lost)} of {count(facts.intended)} adapter tensors in the graph",
        expected="all of them",
    )


CHECK = Check(
    code="LP301",
    name="unreachable-from-loss",
    what="The autograd graph of the training forward does not lead to adapter tensors, and they get no gradient.",
    why="A detach(), a no_grad block or a rebuilt tensor cuts the graph. The value of the loss does not change by it.",
    fix="Look for detach(), .data, torch.tensor(...), numpy and no_grad between the adapted layers and the loss.",
    quiet="Graphs that cannot be walked (reentrant checkpointing, compiled regions): there the gradients decide (LP302).",
    threads=("huggingface/peft#291",),
    explained_by=("LP101", "LP102", "LP103", "LP104", "LP105", "LP106", "LP203", "LP209"),
    sets_ranks_apart=True,
    judge=judge,
)
