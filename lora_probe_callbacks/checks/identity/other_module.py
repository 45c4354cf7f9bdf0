"""LP209: the forward runs on another module than the optimizer's."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, some
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for steps in which the model that the optimizer owns was not the one called."""
    if facts.unobservable:
        return pending(facts.unobservable)
    if facts.moment == "start" or not len(facts.slots):
        return pending("no step was made yet")
    if facts.moment == "end" and not facts.ever_stepped and not facts.forwards:
        return pending("the model was never called with gradients enabled while the probe was watching")
    forwards = facts.training_forwards
    if forwards and any(f.holds_expected for f in forwards):
        return ok()
    read = facts.gradients.read
    if facts.gradients.present.any():
        return ok()  # whoever was called, the gradients arrive
    others = [f.module for f in forwards] or list(facts.elsewhere)
    if others:
        return fail(
            f"the loss was made by {some(others)}, not by the model whose adapter tensors the optimizer owns",
            facts.intended,
            got=f"the forward ran on {some(others)}",
            expected="the forward on the module that holds the optimizer's tensors",
        )
    if facts.moment == "exception" or facts.forwards_without_grad:
        return pending("the model was not called with gradients enabled")
    if not read.any() or (facts.history.missing[read] < PERSISTENT).any():
        return pending("the model was not called in this step")
    return fail(
        f"the optimizer stepped {PERSISTENT} probed steps and the model that it owns was never called: the loss comes from somewhere else",
        facts.intended,
        got="0 calls, every gradient None",
        expected="a call of the model in every step",
    )


CHECK = Check(
    code="LP209",
    name="other-module",
    what="The forward that makes the loss runs on another module object than the one whose tensors the optimizer owns.",
    why="A copy, a second wrapper or the model from before the adapter computes the same loss. The optimizer's own tensors get no gradient.",
    fix="Use one object: build the optimizer from the very model that the loss calls, after all wrapping.",
    quiet="The base model inside a PeftModel (LoRA is injected in place); any call whose gradients arrive.",
    threads=("huggingface/trl#6277", "huggingface/peft#940"),
    explained_by=("LP201", "LP202", "LP203"),
    judge=judge,
)
