"""LP602: a key of rank_pattern or alpha_pattern matches nothing."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, ok, pending, some, warn
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Look for keys that no adapted module matches."""
    if facts.coverage is None:
        return pending("no training forward has begun")
    unmatched = facts.coverage.patterns
    if not unmatched:
        return ok()
    argument = unmatched[0][0]
    keys = [repr(key) for name, key in unmatched if name == argument]
    return warn(
        f"{argument} has {some(keys)}, which no adapted module matches: they have the default",
        cause=argument,
        got=f"{len(keys)} keys of {argument} without a module",
        expected="the end of a name, or a regular expression that matches it to its end",
        fix="compare the keys with model.targeted_module_names; if the list is meant for several architectures nothing is wrong",
    )


CHECK = Check(
    code="LP602",
    name="unmatched-pattern",
    what="A key of rank_pattern or alpha_pattern matches none of the adapted modules. It warns.",
    why="PEFT up to 0.20 ignores such a key in silence: the layers train with the default rank and scaling.",
    fix="Compare the keys with model.targeted_module_names.",
    quiet="Keys that match fused experts and other target_parameters, of which PEFT 0.21 itself warns wrongly.",
    threads=("huggingface/peft#3582", "huggingface/peft#3588"),
    needs=("coverage",),
    judge=judge,
)
