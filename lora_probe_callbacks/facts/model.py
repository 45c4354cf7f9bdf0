"""What is meant to train, and what the model holds of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from lora_probe_callbacks.facts.columns import Slots
from lora_probe_callbacks.facts.words import Mode


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
    copy: bool = False  # bit-equal to the expected adapter when training began, and frozen: its reference
    half: bool = False  # some tensor is stored in 16 bits
    still: int = 0  # probed steps in a row after which it was bit-equal, while the expected adapter moved; lagged only
    still_since: int = 0  # the step in which that row began
    written: int = 0  # of these, those in which something wrote to it all the same
    behind: tuple[
        str, ...
    ] = ()  # lagged only: tensors that stand still while it is written to and the trained ones are far
    lost: float = 0.0  # of the elements that were far from the trained ones, the fraction that stands still
    astray: tuple[str, ...] = ()  # tensors that move away from the trained ones of their places, again and again


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
    def dead(self) -> list[int]:
        """Those of them in which both are zero."""
        return [u for u in self.known if (start := self.units[u]) is not None and start.a == 0 and start.b == 0]

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


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """What the model and the optimizers hold at one decision.

    Attributes:
        expected: Names of the adapters that must train.
        declared: These names were given, not read off the model.
        resumed: As declared.
        new_tokens: As declared.
        slots: The tensors of the expected adapters.
        units: The layers of the expected adapters.
        modes: State of the units now.
        active: Active adapters now.
        trainable_bases: Expected layers whose base weight requires gradients.
        replaced: Slots whose former tensor is still in an optimizer.
        foreign_in_optimizer: Optimizer tensors that belong to no watched module.
        optimizer_tensors: All of their tensors.
        optimizers: Number of optimizers.
        others_train: Some tensor of an optimizer that belongs to no expected adapter requires gradients.
        factors_row: Looks in a row at which the factors of all units were the same; None where nobody counted.
        factors_moved: They have been others before.
        thaw_announced: Something of the framework's own will thaw what is frozen now.
        why_not_owned: Why no tensor of the adapter can be told apart in the optimizer; empty where it can.
        nested: Adapted layers inside adapted layers.
        rewrapped: PeftModels inside PeftModels.
        unloaded: PeftModels whose adapter layers are gone.
        vanished: Tensors that an optimizer steps and whose layer has left the model.
        packed: 4-bit weights in the layout for inference, and all 4-bit weights.
        start: Read before the first training forward, and kept.
        coverage: Likewise.
    """

    expected: tuple[str, ...] = ()
    declared: bool = False
    resumed: bool | None = None
    new_tokens: tuple[int, ...] = ()
    slots: Slots = field(default_factory=Slots.none)
    units: tuple[UnitFact, ...] = ()
    modes: tuple[Mode, ...] = ()
    active: tuple[str, ...] = ()
    trainable_bases: tuple[str, ...] = ()
    replaced: tuple[int, ...] = ()
    foreign_in_optimizer: int = 0
    optimizer_tensors: int = 0
    optimizers: int = 0
    others_train: bool = False
    factors_row: int | None = None
    factors_moved: bool = False
    thaw_announced: bool = False
    why_not_owned: str = ""
    nested: tuple[str, ...] = ()
    rewrapped: tuple[str, ...] = ()
    unloaded: tuple[str, ...] = ()
    vanished: tuple[str, ...] = ()
    packed: tuple[int, int] = (0, 0)
    start: StartFact | None = None
    coverage: Coverage | None = None
