"""LP811: what is served is the base."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail
from lora_probe_callbacks.checks.serving._served import each_served, measured
from lora_probe_callbacks.facts import Facts, ServedFact


def judge(facts: Facts) -> Verdict:
    """Look for targets in which the adapter does nothing."""
    return each_served(facts, "ignored", _judge)


def _judge(served: ServedFact) -> Verdict:
    return fail(
        f"{served.target} ignores the adapter: on the same {served.tokens} tokens it behaves as the base",
        cause=served.target,
        got=measured(served),
        expected="slope 1",
    )


CHECK = Check(
    code="LP811",
    name="served-adapter-ignored",
    what="The log-probs of what was reloaded, merged or is served are those of the base: the effect of the adapter, on minus off, is 0 of the live one.",
    why="An engine that drops an adapter, or was never sent it, answers as fluently as before, and the base is not bad.",
    fix="Ask the engine under the name of the adapter, not of the base; look at what it logged when it loaded it (names that match no module are dropped), and start it with LoRA enabled.",
    quiet="Effects below the noise of both sides, which are undecidable; the answer says how many tokens would settle it.",
    threads=("verl-project/verl#7495", "modelscope/ms-swift#9855", "vllm-project/vllm#34186"),
    needs=("serving",),
    judge=judge,
)
