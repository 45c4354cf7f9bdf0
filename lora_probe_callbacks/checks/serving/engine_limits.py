"""LP816: engines cannot hold all of this adapter."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, absent, warn
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Say what an engine would refuse or leave out."""
    if not facts.limits:
        return absent("nothing was asked that an engine could not hold")
    return warn(
        f"inference engines cannot hold all of this adapter: {'; '.join(facts.limits)}",
        got=f"{len(facts.limits)} things beyond plain LoRA",
        expected="LoRA of linear layers, without a bias",
        fix="merge the adapter and serve the merged model, or verify the endpoint before it is used",
    )


CHECK = Check(
    code="LP816",
    name="engine-cannot-hold",
    what="The adapter has what inference engines refuse or leave out: DoRA, modules_to_save, rows of embeddings, target_parameters, a bias, an initialisation that changes the base; or what some read otherwise: rsLoRA, a high rank. It warns, before anything is served.",
    why="An engine that refuses says so late, and one that leaves a part out says nothing.",
    fix="Merge the adapter and serve the merged model, or train plain LoRA.",
    quiet="Read off vLLM 0.32; an engine that can hold more is proven by comparing its endpoint.",
    threads=("vllm-project/vllm#55193",),
    needs=("serving",),
    judge=judge,
)
