"""LP817: another policy has sampled than the one that trains."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, warn
from lora_probe_callbacks.checks.serving._served import each_rollout
from lora_probe_callbacks.facts import Facts, RolloutFact

LATE = 2  # updates: one is how asynchronous sampling is meant


def judge(facts: Facts) -> Verdict:
    """Look for rollouts whose log-probs are those of an earlier policy, of the base, or of none that is known."""
    return each_rollout(facts, _judge)


def _judge(rollout: RolloutFact) -> Verdict | None:
    got = (
        f"{rollout.apart:.2g} nats a token from the policy that trains, {rollout.nearest:.2g} from the one that fits "
        f"({rollout.tokens} tokens)"
    )
    if rollout.verdict == "ignored":
        return fail(
            "the sampler ignores the adapter, or was never sent it: its log-probs are those of the base",
            rollout.slots,
            cause="ignored",
            got=got,
            expected="the log-probs of the policy that trains",
        )
    if rollout.verdict == "late" and rollout.late >= LATE:
        return fail(
            f"the sampler is {rollout.late} updates behind the policy that trains: its weights were not sent",
            rollout.slots,
            cause="late",
            got=got,
            expected="the policy of this update",
        )
    if rollout.verdict == "late":
        return warn(
            "the sampler is one update behind the policy that trains",
            rollout.slots,
            cause="late",
            got=got,
            expected="the policy of this update",
            fix="if sampling is asynchronous, correct for it (importance sampling); else send the weights before each generation",
        )
    if rollout.verdict == "other":
        return warn(
            "the sampler is none of the policies that are known: neither the one that trains, nor an earlier one, nor the base",
            rollout.slots,
            cause="other",
            got=f"{got}, against an effect of {rollout.effect:.2g}",
            expected="the log-probs of the policy that trains",
            fix="compare the weights of the sampler with the trainer's: another adapter, half of it, another type",
        )
    return None


CHECK = Check(
    code="LP817",
    name="rollout-of-other-policy",
    what="At the first look at each generation the log-probs of the sampler must be those of the policy that trains. It fails if they are those of the base, or of the policy two updates ago or more, and warns of one update, or of none that is known.",
    why="Rewards and losses are computed either way; the run learns little, and the ratio of the two policies is blamed on staleness.",
    fix="Send the weights to the sampler before each generation, merged or as an adapter under a new id, and reset its prefix cache.",
    quiet="Inner steps over one generation, where the policy has moved since; policies that are too near each other to tell.",
    threads=("verl-project/verl#7495", "unslothai/unsloth-zoo#941"),
    needs=("serving",),
    judge=judge,
)
