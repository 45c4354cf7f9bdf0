"""What another model shows of the trained adapter: one that was reloaded, merged, is served, or samples in a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ServingVerdict = Literal["served", "ignored", "partly", "other-adapter", "lossy", "stale", "undecidable"]
# How the log-probs of a sampler come about; "late" is an earlier policy, "sampling" another temperature or top-p.
RolloutVerdict = Literal["same", "late", "ignored", "sampling", "tokens", "other", "undecidable"]


@dataclass(frozen=True, slots=True)
class ServedFact:
    """One target, compared with the live model on the same tokens.

    Attributes:
        target: What it is, in words.
        verdict: What its log-probs fit.
        merged: The adapter is in its weights, so that rounding them may lose it.
        slope: The part of the live effect that it shows.
        low: The lower end of the interval of that.
        high: The upper end.
        correlation: Between the two effects.
        effect: Root mean square of the live effect, in nats a token.
        noise: Of the difference of the bases.
        tokens: Number of tokens that were compared.
        lost: Distance from the live log-probs, as a part of the effect.
        best: The same of the live model, merged exactly and rounded to the type of the target; None: no merge.
        dtype: That type.
        scale: The factor on the scaling of LoRA with which the live model fits; None if it does with none.
        off: Layers without which the live model fits.
        where: The same in words.
        layers: Number of its adapted layers.
        other: The adapter that fits instead; "" if it is none of the model's.
        checkpoint: The earlier state that fits.
        needed: Tokens like these that would settle it; None if no number would.
    """

    target: str
    verdict: ServingVerdict
    merged: bool = False
    slope: float = 1.0
    low: float = 1.0
    high: float = 1.0
    correlation: float = 1.0
    effect: float = 0.0
    noise: float = 0.0
    tokens: int = 0
    lost: float = 0.0
    best: float | None = None
    dtype: str = ""
    scale: float | None = None
    off: tuple[str, ...] = ()
    where: str = ""
    layers: int = 0
    other: str = ""
    checkpoint: str = ""
    needed: int | None = None


@dataclass(frozen=True, slots=True)
class RolloutFact:
    """What was sampled, compared with the policy that trains on it.

    Attributes:
        step: The step in which it was looked at.
        framework_step: Its number in the framework.
        verdict: Which policy has these log-probs.
        slots: The slots of the adapters that were active.
        apart: Root mean square of the distance from the live policy, in nats a token.
        nearest: Of the distance from the policy that fits.
        effect: Of the adapter's effect.
        moved: Of the distance between the live policy and the one of the last look.
        tokens: Number of tokens.
        late: Updates that the sampler is behind.
        temperature: The temperature that fits, of the live policy.
        top_p: The top-p that fits.
        declared: The temperature and top-p that were said.
        why: Why it was not compared.
    """

    step: int
    framework_step: int
    verdict: RolloutVerdict
    slots: frozenset[int] = frozenset()
    apart: float = 0.0
    nearest: float = 0.0
    effect: float = 0.0
    moved: float = 0.0
    tokens: int = 0
    late: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    declared: tuple[float, float] = (1.0, 1.0)
    why: str = ""


@dataclass(frozen=True, eq=False)
class ServingFacts:
    """What is known of models that should hold the adapter."""

    served: tuple[ServedFact, ...] = ()
    limits: tuple[str, ...] = ()  # what inference engines cannot hold of the adapter, in words
    rollouts: tuple[RolloutFact, ...] = ()
