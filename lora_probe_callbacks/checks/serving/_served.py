"""What the checks on served models and on rollouts share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from lora_probe_callbacks.checks._base import Verdict, absent, ok, pending, skipped, worst
from lora_probe_callbacks.facts import Facts, RolloutFact, ServedFact, ServingVerdict

__all__ = ["each_rollout", "each_served", "measured"]


def each_served(facts: Facts, verdict: ServingVerdict, judge: Callable[[ServedFact], Verdict]) -> Verdict:
    """The first target with this verdict; else the first that could be judged.

    Args:
        facts: What is known.
        verdict: The one that a check reports.
        judge: What it says of a target with it.

    Returns:
        A verdict.
    """
    if not facts.served:
        return absent("nothing was compared with the trained model yet")
    return worst([_of(served, verdict, judge) for served in facts.served])


def _of(served: ServedFact, verdict: ServingVerdict, judge: Callable[[ServedFact], Verdict]) -> Verdict:
    if served.verdict == verdict:
        return judge(served)
    if served.verdict == "undecidable":
        return pending(undecided(served))
    return ok()


def undecided(served: ServedFact) -> str:
    """Why a target cannot be told, in words, and what would settle it."""
    if served.needed is None:
        return f"{served.target}: the adapter changes nothing on these tokens, so no number of them tells whether it is there"
    return (
        f"{served.target}: an effect of {served.effect:.2g} nats a token is not told from a noise of {served.noise:.2g} on "
        f"{served.tokens} tokens; it takes {served.needed} like these at least"
    )


def measured(served: ServedFact) -> str:
    """The numbers of a target, in words."""
    return (
        f"slope {served.slope:.3f} in [{served.low:.3f}, {served.high:.3f}], correlation {served.correlation:.4f}, noise "
        f"{served.noise:.2g} against an effect of {served.effect:.2g} nats a token"
    )


def each_rollout(facts: Facts, judge: Callable[[RolloutFact], Verdict | None]) -> Verdict:
    """The first look at a rollout that something is wrong with; else the first that could be judged.

    Args:
        facts: What is known.
        judge: The verdict on one, None where it is not of this check.

    Returns:
        A verdict.
    """
    if not facts.rollouts:
        return absent("no rollout was compared with the policy yet")
    verdicts = []
    for rollout in facts.rollouts:
        verdict = skipped(rollout.why) if rollout.why else judge(rollout)
        if verdict is None and rollout.verdict == "undecidable":
            verdict = pending("the policies of this run are too near each other to tell which one has sampled")
        verdicts.append(dataclasses.replace(verdict or ok(), seen=(rollout.step, rollout.framework_step)))
    return worst(verdicts)
