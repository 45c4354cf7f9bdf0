"""LP819: the sampler's log-probs are of other tokens."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail
from lora_probe_callbacks.checks.serving._served import each_rollout
from lora_probe_callbacks.facts import Facts, RolloutFact


def judge(facts: Facts) -> Verdict:
    """Look for rollouts whose log-probs have nothing to do with these tokens."""
    return each_rollout(facts, _judge)


def _judge(rollout: RolloutFact) -> Verdict | None:
    if rollout.verdict != "tokens":
        return None
    return fail(
        "the sampler's log-probs are not of these tokens: they are unrelated to what any state of the model gives them",
        rollout.slots,
        got=f"{rollout.apart:.2g} nats a token from the policy that trains ({rollout.tokens} tokens)",
        expected="log-probs of the tokens that were sampled, in their order",
    )


CHECK = Check(
    code="LP819",
    name="rollout-of-other-tokens",
    what="The log-probs of the sampler do not belong to the tokens that are trained on: shifted by one, in another order, or of a text that was tokenised again.",
    why="Shapes fit, and every ratio of policies is a ratio of two unrelated numbers.",
    fix="Take token ids from the sampler, not its text, and look at the shift by one between logits and tokens, and at the order after a gather.",
    quiet="An earlier policy or another temperature, whose log-probs are related.",
    explained_by=("LP817", "LP818"),
    needs=("serving",),
    judge=judge,
)
