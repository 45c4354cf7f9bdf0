"""What several processes tell each other."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lora_probe_callbacks.facts.words import Moment, WrapperKind


@dataclass(frozen=True, slots=True)
class Wrapping:
    """What holds several processes together, as this one sees it.

    Attributes:
        kind: The wrapper, or None if there is none.
        first: The smallest rank of those that it holds together, -1 where that is unknown.
        entered: The wrapper's own forward ran in this step, None where that was not seen.
        synced: Its last forward was outside ``no_sync``.
        hook: A communication hook decides what is reduced.
        unmanaged: Slots beside it: their gradients are not reduced by it.
        whole: Number of tensors of which every rank holds a copy.
    """

    kind: WrapperKind | None
    first: int
    entered: bool | None
    synced: bool
    hook: bool
    unmanaged: tuple[int, ...]
    whole: int


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over the adapter tensors of which a rank holds shards, and over those that it holds whole.

    Sums over shards add up over the ranks; in a sum of squares they make the norm of the whole tensor.
    """

    gradients: tuple[float, float] = (0.0, 0.0)  # squares, of A and B, as read at the decision
    received: tuple[float, float] = (0.0, 0.0)  # squares, of A and B, as the optimizer got them in the last update
    moved: tuple[float, float] = (0.0, 0.0)  # elements, of A and B
    elements: tuple[float, float] = (0.0, 0.0)
    size: float = 0.0  # squares of the change
    norm: float = 0.0  # squares of the tensors after it

    def __add__(self, other: Sums) -> Sums:
        return Sums.of([a + b for a, b in zip(self.values, other.values, strict=True)])

    @property
    def values(self) -> list[float]:
        """All ten, in order."""
        return [*self.gradients, *self.received, *self.moved, *self.elements, self.size, self.norm]

    @classmethod
    def of(cls, values: Collection[float]) -> Sums:
        """The inverse of :attr:`values`."""
        a, b, c, d, e, f, g, h, size, norm = values
        return cls((a, b), (c, d), (e, f), (g, h), size, norm)


# A sample of what ranks hold in common: for A, B and the rest two projections and a norm.
Sample = tuple[float, ...]


SAMPLE = 9


NEAR = 1e-3  # of the norm: equal hardware gives equal bits, and unreduced gradients differ by their own size


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one rank has sent at a decision.

    Attributes:
        moment: Where it is.
        step: In which step.
        broken: Its probe has stepped aside after an error of its own.
        bad: Code to status, of what it found.
        first: See :class:`Wrapping`.
        whole: See :class:`Wrapping`.
        unmanaged: Number of its slots beside the wrapper.
        final: Nothing can change its gradients before the update.
        bypassed: The wrapper's own forward did not run.
        unsynced: Its last forward was inside ``no_sync``.
        hook: A communication hook decides what is reduced.
        tensors: Sample of the tensors of which every rank holds a copy.
        gradients: The same of their gradients.
        shards: Its sums over shards.
        words: Code, message, what was got and expected, and cause of the first thing that it found.
        seen: Step and framework step in which it was observed, if that is not the step being decided.
    """

    moment: Moment
    step: int
    broken: bool
    bad: tuple[tuple[str, Literal["warn", "fail"]], ...]
    first: int
    whole: int
    unmanaged: int
    final: bool
    bypassed: bool
    unsynced: bool
    hook: bool
    tensors: Sample
    gradients: Sample
    shards: Sums
    words: tuple[str, str, str, str, str] | None = None
    seen: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class RanksFact:
    """What all ranks have sent at one decision, equal on all of them.

    Attributes:
        reports: One a rank.
        rank: This rank.
        equal_at_start: Tensors were equal at the first decision.
        differed_before: Gradients differed when they were last compared.
        causes: Codes of what was found at former decisions and explains that ranks differ from then on.
        failed: Codes of what failed on some rank, judged by that rank alone.
        found: These, and what some rank was warned of itself that explains that ranks differ.
    """

    reports: tuple[RankReport, ...]
    rank: int
    equal_at_start: bool = True
    differed_before: bool = False
    causes: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    found: tuple[str, ...] = ()

    @property
    def tensors_differ(self) -> tuple[int, int, float] | None:
        """Two ranks that hold different adapter tensors, and by how much of their norm; None if none do."""
        return self._differ([r.tensors for r in self.reports])

    @property
    def gradients_differ(self) -> tuple[int, int, float] | None:
        """The same of the gradients that the optimizer is about to apply on all ranks."""
        return self._differ([r.gradients for r in self.reports]) if self.stepping else None

    @property
    def stepping(self) -> bool:
        """All ranks hold gradients, and their optimizers are about to apply them."""
        return all(r.moment == "step" for r in self.reports) and any(any(r.gradients) for r in self.reports)

    @property
    def bypassed(self) -> bool:
        """On some rank the wrapper's own forward did not run."""
        return any(r.bypassed for r in self.reports)

    @property
    def unsynced(self) -> bool:
        """On some rank the last forward was inside ``no_sync``."""
        return any(r.unsynced for r in self.reports)

    @property
    def unmanaged(self) -> int:
        """The most tensors that the wrapper of some rank leaves out."""
        return max(r.unmanaged for r in self.reports)

    def _differ(self, samples: list[Sample]) -> tuple[int, int, float] | None:
        worst: tuple[int, int, float] | None = None
        for b in range(1, len(samples)):
            mine = self.reports[b]
            a = next((a for a in range(b) if _comparable(self.reports[a], mine)), b)
            apart = _apart(samples[a], samples[b])
            if apart > NEAR and (worst is None or apart > worst[2]):
                worst = (a, b, apart)
        return worst


def _comparable(some: RankReport, other: RankReport) -> bool:
    """They stand below one wrapper and hold as many whole tensors."""
    return some.first == other.first and some.whole == other.whole


def _apart(some: Sample, others: Sample) -> float:
    """The largest difference of two samples, relative to the norm of the role that it is in."""
    if not all(map(math.isfinite, (*some, *others))):
        return 0.0
    largest = 0.0
    for role in range(0, SAMPLE, 3):
        norm = max(some[role + 2], others[role + 2])
        if norm > 0:
            largest = max(largest, *(abs(some[i] - others[i]) / norm for i in range(role, role + 3)))
    return largest


@dataclass(frozen=True, eq=False)
class RankFacts:
    """What holds several processes together, what this one tells the others, and what they told.

    Attributes:
        wrapping: None in a run of one process.
        shards: Slots of which this rank holds a part, and the weight of that part.
        shard_sums: Of this rank.
        sums: Of all slots, over all ranks that were heard.
        tensor_sample: Of what every rank should hold alike.
        gradient_sample: The same of the gradients.
        ranks: None: not exchanged at this decision.
        why_alone: Why nothing will be exchanged; empty while ranks decide together.
    """

    wrapping: Wrapping | None = None
    shards: Mapping[int, float] = field(default_factory=dict)
    shard_sums: Sums = field(default_factory=Sums)
    sums: Sums | None = None
    tensor_sample: Sample = (0.0,) * SAMPLE
    gradient_sample: Sample = (0.0,) * SAMPLE
    ranks: RanksFact | None = None
    why_alone: str = "there is one process"
