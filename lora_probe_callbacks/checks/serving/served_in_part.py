"""LP812: what is served holds a part of the adapter."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail
from lora_probe_callbacks.checks.serving._served import each_served, measured
from lora_probe_callbacks.facts import Facts, ServedFact


def judge(facts: Facts) -> Verdict:
    """Look for targets that the live model fits once some of its layers are switched off."""
    return each_served(facts, "partly", _judge)


def _judge(served: ServedFact) -> Verdict:
    return fail(
        f"{served.target} lacks the adapter in {len(served.off)} of {served.layers} layers: {served.where}",
        cause=served.target,
        got=f"{measured(served)}; the live model without these layers fits",
        expected="slope 1, with all layers",
    )


CHECK = Check(
    code="LP812",
    name="served-in-part",
    what="The log-probs of what was reloaded, merged or is served are those of the live model without the adapter in some layers, which are named: groups are switched off on the live side until it fits.",
    why="A load that matches names takes what it knows and is silent about the rest; the answers differ from the base, so the adapter seems to be there.",
    fix="Compare the names in the adapter's file with the modules of the engine (fused projections, experts, a prefix of a multimodal model), or merge the adapter and serve that.",
    quiet="Adapters at another scale or rounded in a merge (LP814), of which no layer is missing.",
    threads=("vllm-project/vllm#55193", "vllm-project/vllm#42125", "unslothai/unsloth-zoo#941"),
    needs=("serving",),
    judge=judge,
)
