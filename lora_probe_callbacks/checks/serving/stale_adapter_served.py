"""LP815: an earlier state of the adapter is served."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail
from lora_probe_callbacks.checks.serving._served import each_served, measured
from lora_probe_callbacks.facts import Facts, ServedFact


def judge(facts: Facts) -> Verdict:
    """Look for targets that behave as a checkpoint that was written earlier."""
    return each_served(facts, "stale", _judge)


def _judge(served: ServedFact) -> Verdict:
    return fail(
        f"{served.target} is an earlier state of the adapter: {served.checkpoint}",
        cause=served.target,
        got=f"{measured(served)}; the live model with the values of {served.checkpoint} fits",
        expected="the state of now",
    )


CHECK = Check(
    code="LP815",
    name="stale-adapter-served",
    what="What was reloaded or is served behaves as the adapter did at an earlier checkpoint, of those at hand.",
    why="An engine that keeps an adapter by its name or id does not read the folder again when it was written anew.",
    fix="Load it under a new name or id after every save, and clear the engine's prefix cache, or start it again.",
    quiet="Checkpoints that are not at hand cannot be compared: pass them as checkpoints=.",
    threads=("vllm-project/vllm#34186",),
    needs=("serving",),
    judge=judge,
)
