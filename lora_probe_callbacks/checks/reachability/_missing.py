"""How long a gradient may be missing: shared by the checks that look at the graph and at the gradients."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Verdict, fail, pending, some, warn
from lora_probe_callbacks.facts import Facts

__all__ = ["judge_missing", "unreached"]


def unreached(facts: Facts) -> frozenset[int] | None:
    """Slots that ran in a training forward, that its graph does not lead to, and that have no gradient.

    Args:
        facts: What is known.

    Returns:
        The slots, or None where no graph could be walked.
    """
    walked = [f for f in facts.training_forwards if f.reached is not None]
    if any(f.reached is None and f.why_unknown for f in facts.training_forwards):
        return None
    if facts.training_forwards and not any(f.received for f in facts.forwards) and facts.moment != "exception":
        walked = []  # no gradient arrived at any output: the loss does not lead to the model at all
    elif not walked:
        return None
    called = facts.called_units
    reached = frozenset[int]().union(*(f.reached for f in walked if f.reached is not None))
    return frozenset(
        i
        for i in facts.intended - reached
        if facts.slots[i].requires_grad
        and facts.slots[i].unit not in facts.ungraded_units
        and (called is None or facts.slots[i].unit in called)
        and _without_gradient(facts, i)
    )


def _without_gradient(facts: Facts, slot: int) -> bool:
    gradient = facts.gradients[slot] if facts.gradients else None
    if gradient is None:  # not read: only an exception leaves nothing else to go by
        return facts.moment == "exception"
    return not gradient.present


def judge_missing(
    facts: Facts, slots: frozenset[int], message: str, *, got: str, expected: str, fix: str = ""
) -> Verdict:
    """Fail at once if the whole adapter is concerned from the start, else over time.

    A part of an adapter may have no gradient in one batch (a task's head, an expert). After gradients
    were seen, a step without any may belong to another objective under the same optimizer.

    Args:
        facts: What is known.
        slots: The tensors without a gradient.
        message: With a placeholder ``{who}``.
        got: What was got.
        expected: What was expected.
        fix: Replaces the check's advice.

    Returns:
        A verdict: fail, warn or pending.
    """
    names = [facts.slots[i].name for i in sorted(slots)]
    judged = [i for i in facts.intended if facts.gradients and facts.gradients[i] is not None] or list(facts.intended)
    whole = all(i in slots for i in judged)
    who = f"any of the {len(slots)} adapter tensors" if whole else f"{len(slots)} adapter tensors ({some(names)})"
    if message.startswith("{who}"):
        who = f"all {len(slots)} adapter tensors" if whole else who
    text = message.format(who=who)
    row = min(facts.history[i].missing for i in slots)
    ever = any(facts.history[i].had_gradient for i in (judged if whole else slots))
    if facts.moment == "exception" and whole:
        return fail(text, slots, fix=fix, got=got, expected=expected)
    if whole and not ever:
        return fail(text, slots, fix=fix, got=got, expected=expected)
    if row >= PERSISTENT and (whole or not ever):
        return fail(f"{text}, in {row} probed steps in a row", slots, fix=fix, got=got, expected=expected)
    if row >= PERSISTENT or (whole and ever):
        settle = (
            fix
            or "if these steps serve another objective nothing is wrong; if it goes on, it fails after four probed steps"
        )
        return warn(text, slots, fix=settle, got=got, expected=expected)
    return pending(f"{text}; judged after {PERSISTENT} probed steps, {row} so far")
