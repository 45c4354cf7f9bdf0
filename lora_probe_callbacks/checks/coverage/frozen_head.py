"""LP603: a fresh head that nobody trains."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, ok, pending, some, warn
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for frozen heads that look freshly initialised."""
    if facts.coverage is None:
        return pending("no training forward has begun")
    heads = facts.coverage.fresh_heads
    if not heads:
        return ok()
    return warn(
        f"head {some(heads)} looks freshly initialised, is frozen and carries no adapter: nobody trains it",
        cause=",".join(heads),
        got="weights of the very spread of the initialisation and a bias of zeros, requires_grad=False",
        expected=f"modules_to_save={list(heads)}",
        fix=f"pass modules_to_save={list(heads)}, or the task_type, which adds it; if these weights were loaded from a checkpoint nothing is "
        "wrong",
    )


CHECK = Check(
    code="LP603",
    name="frozen-fresh-head",
    what="The head of a classification model is frozen, carries no adapter and still has the values of a fresh initialisation, beside a body "
    "that was pretrained. It warns.",
    why="from_pretrained() makes a new head and says so once; get_peft_model() without task_type or modules_to_save then freezes it. The adapter "
    "learns to serve a random head, which the adapter's file does not hold.",
    fix="modules_to_save=[the head's name], or task_type='SEQ_CLS'.",
    quiet="Heads that train or carry an adapter, heads that were trained before, models made as a whole from a configuration, language-model "
    "heads.",
    needs=("coverage",),
    judge=judge,
)
