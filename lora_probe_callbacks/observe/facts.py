"""The facts: what the observers hand to the checks.

Frozen dataclasses of numbers, strings and indices; what is made anew for every tensor at every decision is a named
tuple, which takes a quarter of the time. No tensor, no module and no judgement is
in here, so a check can be tested without a model, and a fact can be written to a record as it is.

A **slot** is one place that holds one adapter tensor: (module object, attribute). A **unit** is
one adapter in one adapted layer; it owns the slots of its A, its B and whatever else its variant
has. Both are numbered; the numbers are indices into ``Facts.slots`` and ``Facts.units``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

Role = Literal["A", "B", "other"]
Mode = Literal["active", "inactive", "disabled", "merged"]
Moment = Literal["start", "step", "skipped", "end", "exception"]
Values = Literal[
    "equal", "untrained", "start", "previous", "partly", "unrelated", "base", "fresh", "related", "not finite"
]
WrapperKind = Literal["DistributedDataParallel", "FullyShardedDataParallel", "fully_shard", "DeepSpeed"]


class SlotFact(NamedTuple):
    """One adapter tensor that is meant to train.

    Attributes:
        name: Qualified name in the model, for people only. Names never decide.
        adapter: PEFT's adapter name.
        role: ``"A"`` or ``"B"`` of a low-rank pair, else ``"other"``.
        unit: Index of the unit that owns the slot.
        requires_grad: Of the registered tensor, outside a forward.
        owner: Index of the optimizer that owns the registered tensor object, or a copy of it (``CopiesFact``); or None.
        weight_decay: Of its parameter group, or None without an owner.
        frozen_by_intent: Named by ``frozen=`` or by PEFT as not meant to train.
        half: The tensor is stored in 16 bits.
        numel: Number of elements that this rank holds.
    """

    name: str
    adapter: str
    role: Role
    unit: int
    requires_grad: bool
    owner: int | None
    weight_decay: float | None
    frozen_by_intent: bool
    half: bool
    numel: int
    part: str = ""  # PEFT's name of the kind of tensor: "lora_A", "lora_magnitude_vector", "modules_to_save"


@dataclass(frozen=True, slots=True)
class UnitFact:
    """One expected adapter in one adapted layer."""

    name: str
    adapter: str
    slots: tuple[int, ...]
    # The largest part of the model around this layer that did not run while its parent did:
    # "layer" when that is the adapted layer itself (its parent ran and left it out), "branch"
    # when it is something larger (a tower, an expert), "sibling" when the layer stands in a
    # list whose other members ran. None when the layer was called, or calls are not observable.
    idle_part: Literal["layer", "branch", "sibling"] | None = None
    # Its base weight was used in a forward that left the layer out; None where nobody watched.
    base_weight_used: bool | None = None
    lora: bool = True
    scaling: float | None = None  # the factor of the product BA now; None where the method has no such factor
    natural: float | None = None  # alpha/r, or alpha/sqrt(r) under rsLoRA


@dataclass(frozen=True, slots=True)
class ForwardFact:
    """One candidate for a training forward: an outermost call with gradients enabled.

    Attributes:
        module: Name and class of the outermost module that was called.
        received: A gradient arrived at its output.
        modes: State of every unit when the call began.
        active: Names of the active adapters when the call began.
        modes_at_backward: The same when the gradient arrived, or None before that.
        active_at_backward: The same for the active names.
        calls: Calls of each unit's layer inside, as (with the adapter active, in any state, state
            in the last call where it was not active), or None where layers cannot be observed.
        reached: Slots that the graph of the output leads to, or None where that is unknown.
        why_unknown: Why ``reached`` is None.
    """

    module: str
    received: bool
    modes: tuple[Mode, ...]
    active: tuple[str, ...]
    modes_at_backward: tuple[Mode, ...] | None
    active_at_backward: tuple[str, ...] | None
    calls: tuple[tuple[int, int, Mode | None], ...] | None
    reached: frozenset[int] | None
    why_unknown: str | None
    with_grad: frozenset[int] | None = None  # units whose layer ran with gradients enabled
    holds_expected: bool = True  # some expected unit lies below the called module
    carries_graph: bool = True  # some output requires gradients
    dropped: frozenset[int] = frozenset()  # slots behind an operation without a backward

    def mode(self, unit: int) -> Mode:
        """State of a unit in this forward: what its own calls saw, else the state at the beginning."""
        if self.calls is not None:
            good, total, bad = self.calls[unit]
            if total:
                return "active" if good or bad is None else bad
        return self.modes[unit]

    @property
    def plainly_active(self) -> bool:
        """Every unit was active from the beginning and in each of its calls."""
        return set(self.modes) <= {"active"} and all(bad is None for _, _, bad in set(self.calls or ()))

    def called(self, unit: int) -> bool | None:
        """Whether the layer of a unit was called, None where that cannot be seen."""
        return None if self.calls is None else self.calls[unit][1] > 0


class GradientFact(NamedTuple):
    """The kind of gradient that one slot had when it was read, once before the update; its norm stands apart.

    Attributes:
        present: ``.grad`` was not None.
        zero: Every element was exactly zero.
        finite: Every element was finite.
    """

    present: bool
    zero: bool
    finite: bool


class MoveFact(NamedTuple):
    """The kind of change that one step made to one slot; how much stands in ``StepUpdate``.

    Attributes:
        moved: The bits of some element changed, or it is not finite.
        mostly: Those of at least half of its elements did.
        finite: Every element was finite after the step.
    """

    moved: bool
    mostly: bool
    finite: bool


@dataclass(frozen=True, slots=True)
class StepUpdate:
    """The update of one probed step in numbers, judged by the decision that follows it.

    Attributes:
        step: The step that was made.
        framework_step: Its number in the framework.
        starts: By slot, Euclidean norm before the step; None where no optimizer that stepped owns it.
        sizes: Euclidean norm of the change, likewise.
        norms: Euclidean norm after the step, likewise.
        moved: Elements whose bits changed, as a fraction of all, likewise.
        gradient_norms: As the optimizer received the gradient; None where there was none.
    """

    step: int
    framework_step: int
    starts: tuple[float | None, ...]
    sizes: tuple[float | None, ...]
    norms: tuple[float | None, ...]
    moved: tuple[float | None, ...]
    gradient_norms: tuple[float | None, ...]


class SlotHistory(NamedTuple):
    """How often something was seen of one slot, over the probed steps of this session.

    Nothing in here changes while all goes well, so that a verdict on it can stand.
    """

    missing: int = 0  # gradient None, in a row up to now
    zero: int = 0  # gradient exactly zero, in a row up to now
    zero_since: int = 0  # the step in which that row began, while there is one
    rate_zero: int = 0  # learning rate exactly zero, in a row up to now
    rate_rising: bool = False  # it was above the one before
    unmoved: int = 0  # not moved although it had a gradient and a rate, in a row up to now
    lost: int = 0  # fewer than half of its elements moved, likewise
    put_back: int = 0  # a step began with the very values of the one before, which had moved it, in a row up to now
    had_gradient: bool = False  # a gradient other than None was seen
    had_signal: bool = False  # a gradient other than zero was seen
    had_rate: bool = False  # a learning rate other than zero was seen
    had_move: bool = False


@dataclass(frozen=True, slots=True)
class OtherAdapter:
    """An adapter that is not expected to train."""

    name: str
    declared: Literal["reference", "lagged"] | None
    tensors: int
    trainable: int
    owned: int  # tensors in an optimizer
    changed: tuple[str, ...]  # tensors whose values changed in the last probed step
    was_active: bool  # active in some forward of this session
    ever_changed: bool
    active_now: bool
    half: bool = False  # some tensor is stored in 16 bits
    still: int = 0  # probed steps in a row after which it was bit-equal, while the expected adapter moved; lagged only
    still_since: int = 0  # the step in which that row began
    written: int = 0  # of these, those in which something wrote to it all the same


@dataclass(frozen=True, slots=True)
class CopiesFact:
    """Tensors that an optimizer steps in the place of adapter tensors, and that were copies of these at the start.

    Attributes:
        slots: The slots of which it holds copies.
        followed: The adapter's own tensors have changed in training: something writes to them.
        still: Probed steps in a row after which the copies had changed and the adapter had not.
        starved: Step and framework step in which no copy had a gradient when the optimizer stepped, though
            the adapter had one.
    """

    slots: frozenset[int]
    followed: bool = False
    still: int = 0
    starved: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class UnitStart:
    """What one unit held before the first training forward.

    Attributes:
        a: Largest element of A, by size; of the part that this rank holds.
        b: The same of B.
        product: Frobenius norm of BA over the product of the norms of B and A: 0 if the adapter is the identity.
        moves_base: Its initialisation takes the product out of the base weight, so that it is not zero by design.
    """

    a: float
    b: float
    product: float
    moves_base: bool

    @property
    def identity(self) -> bool:
        """The adapter adds nothing. Orthogonal factors cancel up to the rounding of 16 bits."""
        return not self.a or not self.b or self.product < 1e-2


@dataclass(frozen=True)  # without slots: kept for the whole run, so what checks ask for is worked out once
class StartFact:
    """The state in which training began.

    Attributes:
        units: One entry a unit; None where there is no pair of A and B, or it cannot be read.
        framework_step: The framework's number of the first step: above 0 in a run that was resumed.
        optimizer_state: The optimizer holds a state for some adapter tensor already.
    """

    units: tuple[UnitStart | None, ...]
    framework_step: int
    optimizer_state: bool

    @cached_property
    def known(self) -> list[int]:
        """Units with a pair of A and B that could be read."""
        return [u for u, start in enumerate(self.units) if start is not None]

    @cached_property
    def moving(self) -> list[int]:
        """Those of them whose initialisation takes BA out of the base weight."""
        return [u for u in self.known if (start := self.units[u]) is not None and start.moves_base]

    @cached_property
    def plain(self) -> list[int]:
        """The others."""
        return [u for u in self.known if (start := self.units[u]) is not None and not start.moves_base]

    @cached_property
    def identity(self) -> list[int]:
        """Those of the others that added nothing."""
        return [u for u in self.plain if (start := self.units[u]) is not None and start.identity]

    @cached_property
    def changed(self) -> list[int]:
        """Those that added something."""
        return [u for u in self.plain if (start := self.units[u]) is not None and not start.identity]


@dataclass(frozen=True, slots=True)
class Request:
    """One name that PEFT's configuration asks for.

    Attributes:
        adapter: Whose configuration.
        argument: ``"target_modules"``, ``"target_parameters"`` or ``"modules_to_save"``.
        name: As it stands there.
        exists: Some module or parameter of the model has this name.
    """

    adapter: str
    argument: str
    name: str
    exists: bool


@dataclass(frozen=True, slots=True)
class TokenTable:
    """An embedding or head with one row for each token.

    Attributes:
        name: Its name.
        side: ``"input"`` or ``"output"``.
        rows: How many tokens it knows.
        untrained: Declared tokens whose row nobody trains.
    """

    name: str
    side: Literal["input", "output"]
    rows: int
    untrained: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenRowsFact:
    """What came of the gradients of some new tokens, in the embedding that reads them.

    Attributes:
        name: The embedding.
        ids: The tokens that are looked at.
        occurred: How many of them had a gradient at their positions in some probed step.
        starved: Token, and in how many probed steps in a row a gradient came to its positions and its row had
            exactly none when the optimizer stepped.
        seen: Step and framework step of the last look.
    """

    name: str
    ids: tuple[int, ...]
    occurred: int = 0
    starved: tuple[tuple[int, int], ...] = ()
    seen: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Coverage:
    """What was asked for, and what the adapters cover. Read once, when training starts.

    Attributes:
        unmet: Names in a configuration that own no adapted module.
        expected: Declared name parts, and how many adapted modules have each.
        patterns: Keys of ``rank_pattern`` and ``alpha_pattern`` that match no adapted module, as (argument, key).
        sparse: Stacks of layers of which few are adapted, as (name, adapted, all).
        experts: Fused expert weights without an adapter, although projections of their name were asked for.
        untied: Of a tied pair of embedding and head, the one that is trained as a copy and the one that stays.
        fresh_heads: Heads that look freshly initialised, are frozen and carry no adapter.
        tokens: Tables with a row for each token; only if tokens were declared.
        unmade: (part, adapted modules that lack it) of parts that the configuration asks for.
    """

    unmet: tuple[Request, ...] = ()
    expected: tuple[tuple[str, int], ...] = ()
    patterns: tuple[tuple[str, str], ...] = ()
    sparse: tuple[tuple[str, int, int], ...] = ()
    experts: tuple[str, ...] = ()
    untied: tuple[tuple[str, str], ...] = ()
    fresh_heads: tuple[str, ...] = ()
    tokens: tuple[TokenTable, ...] = ()
    unmade: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class ReferenceFact:
    """The forwards beside training, where the loss compares with this model, its adapters disabled.

    Attributes:
        disabled: Some forward of this session ran with the adapters disabled.
        active: Probed steps up to now in which forwards beside training ran, all with an adapter active.
    """

    disabled: bool
    active: int


@dataclass(frozen=True, slots=True)
class BaseDrift:
    """How far sampled base weights under the adapter are from where they started.

    Attributes:
        relative: Root mean square of the change over that of the weight; for quantised
            storage the fraction of codes that changed.
        layer: The layer where it is largest.
        merges: Times that a layer was seen merged since the session began.
        quantised: Stored as quantised codes.
    """

    relative: float
    layer: str
    merges: int
    quantised: bool


@dataclass(frozen=True, slots=True)
class EstimatorFact:
    """One look at an estimator: what it was made of, and where it leads.

    Attributes:
        name: As it was given.
        step: The step in which it was looked at.
        framework_step: Its number in the framework.
        forwards: The forwards of the watched model that made it, as far as they were observed.
        modes: State of every unit after it was made.
        active: The active adapters after it was made.
        graph: What was differentiated carries a graph; None if only gradients or a direction were given.
        reached: Slots that its graph leads to, or None where that is unknown.
        why_unknown: Why ``reached`` is None.
        foreign: Trainable parameters that its graph leads to and that the watched model does not hold.
        without_grad: Calls of the watched model without gradients that may have made it.
        inference: It was made under ``inference_mode``.
        elsewhere: Other models with adapters that are alive; looked for only where no forward explains it.
        direction: Slots that the update direction was built on, or None if there is none.
        direction_foreign: Entries of the direction that are no parameter of the watched model.
        missing: Slots whose gradient of the estimator's loss is None; None if no gradient was seen.
        zero: Looks in a row, this one included, at which all its gradients were exactly zero.
        why_not: Why it could not be computed.
        untrusted: What its self-check found, if that is why.
        count: Its prompts, or None if it was not computed.
        recent: delta_1 and its standard error of the last ones, this one included.
    """

    name: str
    step: int
    framework_step: int
    forwards: tuple[ForwardFact, ...]
    modes: tuple[Mode, ...]
    active: tuple[str, ...]
    graph: bool | None = None
    reached: frozenset[int] | None = None
    why_unknown: str | None = None
    foreign: int = 0
    without_grad: int = 0
    inference: bool = False
    elsewhere: tuple[str, ...] = ()
    direction: frozenset[int] | None = None
    direction_foreign: tuple[str, ...] = ()
    missing: frozenset[int] | None = None
    zero: int = 0
    why_not: str | None = None
    untrusted: str | None = None
    count: int | None = None
    recent: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResponse:
    """What the update of one step did to the loss, and what its gradient had said.

    Attributes:
        step: The step.
        framework_step: Its number in the framework.
        predicted: Sum of gradient times update.
        measured: Change of the outputs by the update, times the gradient that had arrived at them.
        central: A central difference along the gradient over what the gradient says: 1 if it is right.
        sides: What the half ahead and the half behind say alone: a kink makes them differ.
        own: The central difference for a gradient made anew from the outputs alone, a little aside and at half the
            distance. This and what follows is measured only as long as nothing before it settles the question.
        again: The same at twice the distance.
        noise: What rounding makes of these, at least.
        why_not: Why nothing was measured.
        passing: That may be over in the next step.
    """

    step: int
    framework_step: int
    predicted: float | None = None
    measured: float | None = None
    central: float | None = None
    sides: tuple[float, float] | None = None
    own: float | None = None
    again: float | None = None
    noise: float = 0.0
    why_not: str | None = None
    passing: bool = False


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
    """

    reports: tuple[RankReport, ...]
    rank: int
    equal_at_start: bool = True
    differed_before: bool = False
    causes: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[str, ...]:
        """Codes of what failed on some rank, judged by that rank alone."""
        codes = {c for r in self.reports for c, status in r.bad if status == "fail"}
        return tuple(sorted(c for c in codes if not c.startswith("LP7")))

    @property
    def found(self) -> tuple[str, ...]:
        """Codes of what some rank saw of itself, apart from mere hints: causes of what differs between ranks."""
        hints = ("LP104", "LP301", "LP302", "LP303")
        return tuple(sorted({*self.failed, *(c for r in self.reports for c, _ in r.bad if c in hints)}))

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


@dataclass(frozen=True, slots=True)
class SavedFact:
    """One adapter in one saved file, compared with the live adapter as it was when the file was written.

    Attributes:
        path: The file, or the folder in which it was looked for.
        adapter: The adapter that it should hold.
        step: The step in which it was saved, or looked at.
        framework_step: Its number in the framework.
        slots: The slots of the adapter.
        form: ``"adapter"`` as PEFT writes it; ``"state"`` of a whole module under its own names; ``"model"``,
            a whole model that ``from_pretrained`` will read.
        unreadable: Why the file cannot be read at all.
        final: Nobody trains any more: a file that cannot be read now stays so.
        before_steps: No step was made yet: the adapter should be the file's, if that was restored.
        why_not: Why it was not compared at all.
        tensors: Number of tensors that the file should hold of the adapter.
        missing: Those that it does not hold.
        empty: Those of which it holds no element.
        wrapped: Names in the file that carry the name of a wrapper.
        foreign: Names in the file that stand for nothing in the model.
        shapes: Name, shape in the file and live, where they differ.
        values: How the values compare; None where they were not compared. ``"untrained"``: every B is zero;
            ``"start"``: as when training began; ``"previous"``: as in the file before, though the adapter has
            moved; ``"partly"``: some tensors are right, others not; ``"unrelated"``: they have nothing in
            common; ``"base"``: the adapted weights are the base's; ``"fresh"``: the live adapter was never
            trained, and the file's was; ``"related"``: they point the same way, as an average over steps does.
        differing: Names of tensors with other values.
        apart: Relative distance of the values.
        why_no_values: Why they were not compared.
        other: The adapter whose values these are.
        converted: PEFT's conversion of PiSSA and its like to plain LoRA: A and B of the trained adapter beside those
            of the initial one, at twice the rank.
        settings: Setting, saved and live, where a reload would compute something else.
        left_out: What was trained or resized beside the adapter and is not in the file, and how.
        beside: Another file of weights in the same folder, which may hold that.
    """

    path: str
    adapter: str
    step: int
    framework_step: int
    slots: frozenset[int] = frozenset()
    form: Literal["adapter", "state", "model"] = "adapter"
    unreadable: str | None = None
    final: bool = False
    before_steps: bool = False
    why_not: str | None = None
    tensors: int = 0
    missing: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    wrapped: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    shapes: tuple[tuple[str, str, str], ...] = ()
    values: Values | None = None
    differing: tuple[str, ...] = ()
    apart: float = 0.0
    why_no_values: str | None = None
    other: str | None = None
    converted: bool = False
    settings: tuple[tuple[str, str, str], ...] = ()
    left_out: tuple[tuple[str, Literal["trained embedding", "resized embedding", "trained"]], ...] = ()
    beside: str | None = None


@dataclass(frozen=True, slots=True)
class ResumedFact:
    """A run that goes on from a saved state, compared with what was saved.

    Attributes:
        source: Where the saved state comes from.
        whole: The framework restores the optimizer together with this state.
        known: Slots of which the saved state holds a fingerprint.
        unknown: Names in the saved state that are not in this model.
        differing: Slots with other values than were saved.
        fresh: Every B is exactly zero, and was not when it was saved.
        optimizer: Slots whose optimizer state was compared.
        wrong: Slot, and the name of the slot whose state it has, or "" where it is nobody's.
        lost: Slots that had a state and have none.
        rates: Slots whose learning rate is another slot's.
        base: Relative distance of sampled base weights, None where they were not compared.
        base_layer: The layer where it is largest.
        why_no_base: Why they were not compared.
    """

    source: str
    whole: bool
    known: frozenset[int]
    unknown: int = 0
    differing: tuple[int, ...] = ()
    fresh: bool = False
    optimizer: frozenset[int] = frozenset()
    wrong: tuple[tuple[int, str], ...] = ()
    lost: tuple[int, ...] = ()
    rates: tuple[int, ...] = ()
    base: float | None = None
    base_layer: str = ""
    why_no_base: str | None = None


@dataclass(frozen=True)  # without slots: what every check asks for is worked out once
class Facts:
    """All that is known at one decision.

    ``step`` and ``framework_step`` are of the step being decided; ``update`` tells of an earlier one.
    """

    moment: Moment
    optimizer: int | None  # whose event this is; None at the start, at the end and after an exception
    step: int
    framework_step: int
    expected: tuple[str, ...]
    declared: bool  # the expected names were given, not read off the model
    slots: tuple[SlotFact, ...]
    units: tuple[UnitFact, ...]
    modes: tuple[Mode, ...]  # state of the units now
    active: tuple[str, ...]  # active adapters now
    history: tuple[SlotHistory, ...]
    reads: tuple[int, ...] = ()  # how often the gradient of each slot was looked at
    rates: tuple[float | None, ...] = ()  # learning rates by slot, which schedules change; None without an owner
    forwards: tuple[ForwardFact, ...] = ()
    forwards_without_grad: int = 0
    unobservable: str | None = None  # why forwards cannot be seen at all
    gradients: tuple[GradientFact | None, ...] = ()  # None: not read at this decision
    gradient_norms: tuple[float | None, ...] = ()  # unscaled where the scale is known; None: there was none to read
    gradients_final: bool = False  # nothing can change them between this reading and the update
    update: StepUpdate | None = None
    moves: tuple[MoveFact | None, ...] = ()  # of that update, by slot; empty without one
    others: tuple[OtherAdapter, ...] = ()
    base_drift: BaseDrift | None = None
    trainable_bases: tuple[str, ...] = ()
    replaced: tuple[int, ...] = ()  # slots whose former tensor is still in an optimizer
    copies: CopiesFact | None = None  # None: the optimizer holds no copies of the adapter
    foreign_in_optimizer: int = 0  # optimizer tensors that belong to no watched module
    optimizer_tensors: int = 0
    optimizers: int = 0
    nested: tuple[str, ...] = ()  # adapted layers inside adapted layers
    rewrapped: tuple[str, ...] = ()  # PeftModels inside PeftModels
    unloaded: tuple[str, ...] = ()  # PeftModels whose adapter layers are gone
    vanished: tuple[str, ...] = ()  # tensors that an optimizer steps and whose layer has left the model
    elsewhere: tuple[str, ...] = ()  # other models with adapters that received gradients
    skipped_in_a_row: int = 0
    ever_stepped: bool = False
    scaler: bool = False
    loss_scale: float | None = None
    all_non_finite: bool = False  # nothing that arrived was finite
    packed: tuple[int, int] = (0, 0)  # 4-bit weights in the layout for inference, and all 4-bit weights
    stale_forward: tuple[bool, str] | None = None  # (stale, what was compared)
    why_not_repeated: str | None = None
    estimators: tuple[EstimatorFact, ...] = ()  # looked at since the last decision
    saves: tuple[SavedFact, ...] = ()  # files looked at since the last decision
    restored: ResumedFact | None = None  # compared at this decision
    responses: tuple[StepResponse, ...] = ()  # of the steps in which it was looked for, the last ones
    wrapping: Wrapping | None = None  # None in a run of one process
    shards: Mapping[int, float] = field(default_factory=dict)  # slot of which this rank holds a part, and its weight
    shard_sums: Sums = Sums()  # of this rank
    sums: Sums | None = None  # of all slots, over all ranks that were heard
    tensor_sample: Sample = (0.0,) * SAMPLE
    gradient_sample: Sample = (0.0,) * SAMPLE
    ranks: RanksFact | None = None  # None: not exchanged at this decision
    resumed: bool | None = None  # as declared
    reference: ReferenceFact | None = None  # None: not declared
    new_tokens: tuple[int, ...] = ()  # as declared
    token_rows: tuple[TokenRowsFact, ...] = ()  # of embeddings in which they can be watched
    start: StartFact | None = None  # read before the first training forward, and kept
    coverage: Coverage | None = None  # likewise
    why_alone: str = "there is one process"  # why nothing will be exchanged; empty while ranks decide together
    why_not_owned: str = ""  # why no tensor of the adapter can be told apart in the optimizer

    @cached_property
    def training_forwards(self) -> tuple[ForwardFact, ...]:
        """The candidates whose output received a gradient; the only candidate if there was but one."""
        received = tuple(f for f in self.forwards if f.received)
        if received:
            return received
        return self.forwards if len(self.forwards) == 1 else ()

    @cached_property
    def nobody_called(self) -> bool:
        """No forward on the expected model was seen, and not one expected gradient is there."""
        read = [g for g in self.gradients if g is not None]
        return (
            bool(read)
            and not any(g.present for g in read)
            and self.unobservable is None
            and not any(f.holds_expected for f in self.training_forwards)
        )

    @cached_property
    def called_units(self) -> frozenset[int] | None:
        """Units whose layer ran in a training forward, or None where calls cannot be seen."""
        forwards = self.training_forwards
        if not forwards or any(f.calls is None for f in forwards):
            return None
        return frozenset(u for f in forwards for u, (_, total, _) in enumerate(f.calls or ()) if total)

    @cached_property
    def ungraded_units(self) -> frozenset[int]:
        """Units whose layer ran in the training forwards, but never with gradients enabled."""
        forwards = [f for f in self.training_forwards if f.with_grad is not None]
        graded = frozenset[int]().union(*(f.with_grad for f in forwards if f.with_grad is not None))
        return frozenset(u for u in range(len(self.units)) if u not in graded and any(f.called(u) for f in forwards))

    def bad_units(self, mode: Mode | None = None) -> frozenset[int]:
        """Units that were not active in any training forward (in ``mode``, if one is given)."""
        idle = {u: modes for u, modes in self.odd_modes.items() if "active" not in modes}
        return frozenset(u for u, modes in idle.items() if mode is None or mode in modes)

    @cached_property
    def odd_modes(self) -> Mapping[int, frozenset[Mode]]:
        """Unit to its states in the training forwards, for those that were not active in all of them."""
        if all(f.plainly_active for f in self.training_forwards):
            return {}
        found = {u: frozenset(f.mode(u) for f in self.training_forwards) for u in range(len(self.units))}
        return {u: modes for u, modes in found.items() if modes != {"active"}}

    @cached_property
    def merged_units(self) -> frozenset[int]:
        """Units that were merged in some training forward."""
        return frozenset(u for u, modes in self.odd_modes.items() if "merged" in modes)

    def units_of(self, adapter: str) -> frozenset[int]:
        """The units of one expected adapter."""
        return self._units_by_adapter.get(adapter, frozenset())

    @cached_property
    def _units_by_adapter(self) -> Mapping[str, frozenset[int]]:
        names = dict.fromkeys(unit.adapter for unit in self.units)
        return {name: frozenset(i for i, u in enumerate(self.units) if u.adapter == name) for name in names}

    def low_rank_units_of(self, adapter: str) -> frozenset[int]:
        """Those of them that merging concerns: a ``modules_to_save`` copy cannot be merged."""
        units = self.units_of(adapter)
        return frozenset(u for u in units if self.units[u].lora) or units

    def slots_of_units(self, units: Collection[int]) -> frozenset[int]:
        """The slots that the given units own."""
        return frozenset(s for u in units for s in self.units[u].slots)

    @cached_property
    def intended(self) -> frozenset[int]:
        """The slots that must train: all but those meant to stay frozen."""
        return frozenset(i for i, s in enumerate(self.slots) if not s.frozen_by_intent)

    @cached_property
    def total(self) -> Sums:
        """Sums over all slots: over all ranks where these were heard, else over what this rank holds."""
        return self.sums or self.sums_over({})

    def sums_over(self, weights: Mapping[int, float], *, others: float = 1.0) -> Sums:
        """Sums over slots, for norms over all of them.

        Args:
            weights: Slot to its share: less than 1 for a shard that several ranks hold.
            others: The share of slots that are not in ``weights``.

        Returns:
            Sums of squares and of elements.
        """
        shares = [weights.get(i, others) for i in range(len(self.slots))]
        a, b = ([n if s.role == role else 0.0 for s, n in zip(self.slots, shares, strict=True)] for role in ("A", "B"))
        mine = [[n if i in self.intended else 0.0 for i, n in enumerate(part)] for part in (a, b)]
        numel = [s.numel for s in self.slots]
        change = self.update or StepUpdate(0, 0, (), (), (), (), ())
        stepped = [None if v is None else 1.0 for v in change.moved]
        return Sums(
            gradients=(_squares(self.gradient_norms, mine[0]), _squares(self.gradient_norms, mine[1])),
            received=(_squares(change.gradient_norms, a), _squares(change.gradient_norms, b)),
            moved=(_elements(change.moved, numel, a), _elements(change.moved, numel, b)),
            elements=(_elements(stepped, numel, a), _elements(stepped, numel, b)),
            size=_squares(change.sizes, shares),
            norm=_squares(change.norms, shares),
        )


def _squares(column: Sequence[float | None], shares: Sequence[float]) -> float:
    """The sum of squares over slots; a share of 0 keeps out what is not finite, too."""
    return sum(share * v * v for share, v in zip(shares, column, strict=False) if share and v is not None)


def _elements(column: Sequence[float | None], numel: Sequence[int], shares: Sequence[float]) -> float:
    """The number of elements, of which a column holds fractions."""
    entries = zip(shares, numel, column, strict=False)
    return sum(share * n * v for share, n, v in entries if share and v is not None)
