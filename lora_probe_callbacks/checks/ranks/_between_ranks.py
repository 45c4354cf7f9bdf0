"""What the checks between ranks have in common: when ranks can be compared, and which of them has the say."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Verdict, pending, skipped, some
from lora_probe_callbacks.facts import Facts, RanksFact

__all__ = ["alone", "explained", "not_comparable", "reduction_is_missing", "unmanaged"]


def alone(facts: Facts) -> Verdict:
    """Say that ranks could not be compared.

    Args:
        facts: What is known.

    Returns:
        Skipped, or pending while the ranks decide together.
    """
    return skipped(facts.why_alone) if facts.why_alone else pending("nothing is exchanged at this decision")


def not_comparable(facts: Facts) -> str:
    """Say why no two ranks hold the same tensors, or return the empty string.

    Args:
        facts: What is known.

    Returns:
        A reason.
    """
    if facts.why_not_owned or (facts.wrapping is not None and facts.wrapping.kind == "DeepSpeed"):
        return "DeepSpeed keeps master copies and gradients of its own"
    if facts.wrapping is not None and not facts.wrapping.whole:
        return "every adapter tensor is in shards: no two ranks should hold the same"
    return ""


def explained(ranks: RanksFact, code: str) -> str:
    """Name what explains that ranks differ, now or since a former decision.

    A rank may have found it of itself: ranks that are in different states differ in their tensors. And of
    the three things that are seen between ranks the first is the cause of the others.

    Args:
        ranks: What all ranks have sent.
        code: Of the check that asks.

    Returns:
        A reason, or the empty string.
    """
    causes = sorted({*ranks.found, *ranks.causes} - {code})
    return f"explained by {some(causes)}" if causes else ""


def unmanaged(facts: Facts) -> bool:
    """Tell whether tensors beside the wrapper are why ranks differ.

    Args:
        facts: What is known.

    Returns:
        True if they are.
    """
    ranks = facts.ranks
    if ranks is None or not ranks.unmanaged:
        return False
    return ranks.tensors_differ is not None or (ranks.gradients_differ is not None and _final(ranks))


def reduction_is_missing(facts: Facts) -> bool:
    """Tell whether gradients are not reduced: they differ when nothing can change them any more, or had their effect.

    Where tensors differ already, gradients may differ because of that: then it takes more than that they do.

    Args:
        facts: What is known.

    Returns:
        True if they are not, though the tensors that they are of were equal.
    """
    ranks = facts.ranks
    if ranks is None or ranks.gradients_differ is None or not ranks.equal_at_start:
        return False
    if ranks.tensors_differ is None:
        return _final(ranks)
    return ranks.differed_before or ranks.bypassed or ranks.unsynced


def _final(ranks: RanksFact) -> bool:
    return all(r.final for r in ranks.reports)
