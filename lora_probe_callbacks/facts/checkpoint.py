"""What a saved file holds, compared with the live adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LeftOut = Literal["trained embedding", "resized embedding", "trained"]


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
        asked: Somebody asked by hand whether this is the adapter: what is near it is not it.
        why_not: Why it was not compared at all.
        tensors: Number of tensors that the file should hold of the adapter.
        missing: Those that it does not hold.
        empty: Those of which it holds no element.
        wrapped: Names in the file that carry the name of a wrapper.
        foreign: Names in the file that stand for nothing in the model.
        shapes: Name, shape in the file and live, where they differ.
        compared: Number of tensors of which values were compared.
        differing: Names of those with other values than the live ones.
        rounded: The 16-bit type to which live values were rounded on their way into a file of a wider type.
        near: Why the differing values may be meant as the live ones; empty where nothing explains them.
        farthest: Names of the tensors that differ most, by their own norm, and how much, ``|file - live| / |live|``.
        zero_b: Every compared B is exactly zero in the file.
        live_zero_b: Every live B is exactly zero. This and what follows is known where values differ.
        b_moved: Some B was moved by a step before.
        not_finite: Number of compared tensors that are finite in the model and not in the file.
        moved: Number of compared tensors that have changed since training began.
        moved_right: Those of them with the live values.
        like_start: All values are those of the start.
        like_previous: All values are those of the file before this one, and the live ones have changed since.
        apart: Relative distance of the values, ``|file - live| / |live|``.
        cosine: Between those of all A (of all tensors, where there is no A).
        why_no_values: Why the values were not compared, or why other ones than the live ones may be right.
        other: The adapter whose values these are.
        converted: PEFT's conversion of PiSSA and its like to plain LoRA: A and B of the trained adapter beside those
            of the initial one, at twice the rank.
        settings: Setting, saved and live, where a reload would compute something else.
        left_out: What was trained or resized beside the adapter and is not in the file, and how.
        unsaved: What training itself has moved beside the adapter and is not in the file: name and relative change.
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
    asked: bool = False
    why_not: str | None = None
    tensors: int = 0
    missing: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    wrapped: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    shapes: tuple[tuple[str, str, str], ...] = ()
    compared: int = 0
    differing: tuple[str, ...] = ()
    rounded: str = ""
    near: str = ""
    farthest: tuple[tuple[str, float], ...] = ()
    zero_b: bool = False
    live_zero_b: bool = False
    b_moved: bool = False
    not_finite: int = 0
    moved: int = 0
    moved_right: int = 0
    like_start: bool = False
    like_previous: bool = False
    apart: float = 0.0
    cosine: float = 1.0
    why_no_values: str | None = None
    other: str | None = None
    converted: bool = False
    settings: tuple[tuple[str, str, str], ...] = ()
    left_out: tuple[tuple[str, LeftOut], ...] = ()
    unsaved: tuple[tuple[str, float], ...] = ()
    beside: str | None = None

    @property
    def as_live(self) -> bool:
        """Every value that was compared is the live one, and B is not zero in spite of training."""
        return bool(self.compared) and not self.differing and not (self.zero_b and self.b_moved)


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


@dataclass(frozen=True, eq=False)
class FileFacts:
    """Files looked at since the last decision, and what a resumed run was compared with at this one."""

    saves: tuple[SavedFact, ...] = ()
    restored: ResumedFact | None = None
