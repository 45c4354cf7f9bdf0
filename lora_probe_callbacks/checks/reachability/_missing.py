"""How long a gradient may be missing: shared by the checks that look at the graph and at the gradients."""

from __future__ import annotations

import numpy as np

from lora_probe_callbacks.checks._base import PERSISTENT, Verdict, fail, pending, some, warn
from lora_probe_callbacks.facts import Bools, Facts, count, mask

__all__ = ["judge_missing", "unreached"]


def unreached(facts: Facts) -> Bools | None:
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
    lost = facts.intended & facts.slots.requires_grad & _without_gradient(facts)
    if not lost.any():  # as a rule
        return lost
    reached = frozenset[int]().union(*(f.reached for f in walked if f.reached is not None))
    lost &= ~mask(reached, len(facts.slots)) & ~facts.slots_of_units(facts.ungraded_units)
    return lost if facts.called_slots is None else lost & facts.called_slots


def _without_gradient(facts: Facts) -> Bools:
    """None when it was read; where it was not, only an exception leaves nothing else to go by."""
    unread = ~facts.gradients.read if facts.moment == "exception" else np.zeros(len(facts.slots), np.bool_)
    found: Bools = facts.gradients.missing | unread
    return found


def judge_missing(facts: Facts, slots: Bools, message: str, *, got: str, expected: str, fix: str = "") -> Verdict:
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
    read = facts.intended & facts.gradients.read
    judged = read if read.any() else facts.intended
    whole = not (judged & ~slots).any()
    number, names = count(slots), some(facts.slots.names(slots))
    who = f"any of the {number} adapter tensors" if whole else f"{number} adapter tensors ({names})"
    if message.startswith("{who}"):
        who = f"all {number} adapter tensors" if whole else who
    text = message.format(who=who)
    row = int(facts.history.missing[slots].min())
    ever = bool(facts.history.had_gradient[judged if whole else slots].any())
    if whole and (facts.moment == "exception" or not ever):
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
