"""LP818: the sampler has another temperature or top-p than was said."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, warn
from lora_probe_callbacks.checks.serving._served import each_rollout
from lora_probe_callbacks.facts import Facts, RolloutFact


def judge(facts: Facts) -> Verdict:
    """Look for rollouts whose log-probs are those of the policy at another temperature, or cut off at a top-p."""
    return each_rollout(facts, _judge)


def _judge(rollout: RolloutFact) -> Verdict | None:
    if rollout.verdict != "sampling":
        return None
    found = f"temperature {rollout.temperature:.3g}" + (f" and top-p {rollout.top_p:.2g}" if rollout.top_p < 1 else "")
    temperature, top_p = rollout.declared
    return warn(
        f"the sampler's log-probs are those of the policy at {found}",
        rollout.slots,
        cause=found,
        got=f"{rollout.apart:.2g} nats a token from the policy as it was said to sample, {rollout.nearest:.2g} at {found}",
        expected=f"temperature {temperature:.3g}" + (f" and top-p {top_p:.2g}" if top_p < 1 else ""),
        fix="compute the trainer's log-probs at the temperature of the sampler, and sample without top-p and top-k where ratios are taken",
    )


CHECK = Check(
    code="LP818",
    name="rollout-other-sampling",
    what="The log-probs of the sampler are those of the right policy at another temperature, or renormalised over a top-p. It warns.",
    why="The ratio of the two policies is off by a known factor in every token, and looks like a policy that has moved.",
    fix="Compute the trainer's log-probs at the temperature of the sampler, and sample without top-p and top-k.",
    quiet="Log-probs before the temperature is applied, which many engines return.",
    explained_by=("LP817",),
    needs=("serving",),
    judge=judge,
)
