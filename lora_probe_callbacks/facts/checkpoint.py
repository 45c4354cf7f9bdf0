"""What a saved file holds, compared with the live adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_probe_callbacks.facts.words import Values


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
