"""For which adapter tensors has each claim been proven, and since when not?

A proof is given by an observation, never by the absence of a complaint, and it ages: where it could have been renewed
and is not, it stops counting after ``PATIENCE`` probed steps. A tensor that rests for longer and comes back (layers
that train in turns, batches without a signal) shows a pattern; from then on it may rest twice as long as it has.

All of it is columns over the slots, so that a run with thousands of tensors costs a few array operations more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lora_probe_callbacks.checks._base import Check, Verdict
from lora_probe_callbacks.facts import Bools, Facts, Ints, SavedFact
from lora_probe_callbacks.facts.proof import CLAIMS, Claim, Proof

__all__ = ["PATIENCE", "ProofBook", "claims_of"]

PATIENCE = 16  # probed steps in which it could have been renewed
_STEPPED: tuple[Claim, ...] = ("active", "reached", "owned", "moved", "seen")
_OF_FAMILY: Mapping[str, tuple[Claim, ...]] = {
    "supervision": ("supervised",),
    "activation": ("active",),
    "reachability": ("reached",),
    "identity": ("owned",),
    "update": ("moved", "seen"),
    "ranks": ("agreed",),
    "checkpoints": ("saved",),
    "serving": ("served",),
}


def claims_of(checks: Iterable[Check]) -> frozenset[Claim]:
    """The claims that a selection of checks is about.

    Args:
        checks: Those that were asked for.

    Returns:
        What their families diagnose.
    """
    found = {claim for check in checks for claim in _OF_FAMILY.get(check.family, ())}
    return frozenset(found | {"gradient"} if any("finite difference" in check.needs for check in checks) else found)


@dataclass(eq=False, slots=True)
class _Column:
    """What is known of one claim, one entry a slot."""

    last: Ints  # the step at which it was observed last, -1 if it never was
    missed: Ints  # in a row up to now: it could have been renewed, and was not
    rested: Ints  # the longest such row after which it came back

    @classmethod
    def of(cls, size: int) -> _Column:
        return cls(np.full(size, -1), np.zeros(size, np.int64), np.zeros(size, np.int64))

    def enter(self, seen: Bools, could: Bools, step: int) -> None:
        self.rested = np.where(seen, np.maximum(self.rested, self.missed), self.rested)
        self.last = np.where(seen, step, self.last)
        self.missed = np.where(seen, 0, self.missed + could)

    @property
    def holds(self) -> Bools:
        return (self.last >= 0) & ~self.stale

    @property
    def stale(self) -> Bools:
        """It was not renewed for too long."""
        over: Bools = self.missed >= np.maximum(PATIENCE, 2 * self.rested)
        return over


class ProofBook:
    """The proofs of one run.

    Args:
        claims: Those that the selected checks are about.
        lapsed: The optimizers that step no more, although backward passes go on.
    """

    def __init__(self, claims: Collection[Claim], lapsed: Callable[[], Collection[int]] = tuple) -> None:
        self._claims = claims
        self._lapsed = lapsed
        self._saved: dict[str, str] = {}  # adapter to the file that was looked at last, in words
        self._in_file: Bools = np.zeros(0, np.bool_)  # slots of which some file was looked at
        self.begin(0)

    def begin(self, size: int) -> None:
        """Start with nothing proven.

        Args:
            size: Number of slots.
        """
        self._columns = {claim: _Column.of(size) for claim in CLAIMS}
        self._ran = np.zeros(size, np.bool_)  # its layer has run in some forward
        self._trainable = np.zeros(size, np.bool_)  # it has required gradients at some decision
        self._signal_at = np.full(size, -1)  # the step of the last gradient that was not zero
        self._ran_at = np.full(size, -1)  # the last step in which its layer ran in a training forward
        self._blamed = np.zeros(size, "<U5")  # code of the check that spoke of it last
        self._somebody_ran = self._is_stale = self._supervision_seen = False
        self._calls = [0, 0]  # forwards that were seen with gradients, and without
        self._backward = False  # some pass may have followed them
        self._in_file = np.zeros(size, np.bool_)
        self._sampled = False  # some rollout was compared with the policy
        self._facts = Facts()
        self._details: dict[Claim, str] = {}  # what a claim was proven by, where that is worth a word

    def __len__(self) -> int:
        return len(self._ran)

    # --- observing --------------------------------------------------------------------------

    def enter(self, facts: Facts, verdicts: Mapping[str, Verdict]) -> None:
        """Add what one decision has observed.

        Args:
            facts: What was known.
            verdicts: What the checks said of it.
        """
        if len(facts.slots) != len(self):
            self.begin(len(facts.slots))
        self._facts = facts
        self._calls[0] += len(facts.forwards)
        self._calls[1] += facts.forwards_without_grad
        self._backward |= bool(facts.forwards) and facts.backward_called is not False
        for code, verdict in verdicts.items():
            if verdict.status in ("warn", "fail") and verdict.slots:
                self._blamed[[slot for slot in verdict.slots if slot < len(self)]] = code
        self._trainable |= facts.slots.requires_grad
        if facts.update is not None or facts.copies is not None:
            self._enter_update(facts)
        if facts.moment not in ("start", "exception"):
            self._enter_forwards(facts)
        if len(facts.measured) == len(self):
            self._columns["gradient"].last = facts.measured.copy()
        if facts.wrapping is not None and facts.ranks is not None and facts.ranks.stepping:
            same = facts.ranks.tensors_differ is None and facts.ranks.gradients_differ is None
            self._enter("agreed", np.full(len(self), same), facts.intended, facts.step)
        self.enter_saves(facts.saves)
        for rollout in facts.rollouts:
            if rollout.verdict != "undecidable":  # what cannot be told is no proof, and takes none away
                self._sampled = True
                self._columns["served"].last[:] = rollout.step if rollout.verdict == "same" else -1

    def _enter(self, claim: Claim, seen: Bools, could: Bools, step: int) -> None:
        self._columns[claim].enter(seen, could, step)

    def _enter_update(self, facts: Facts) -> None:
        """The update before this decision: it belongs to its own step."""
        step = facts.step - 1 if facts.update is None else facts.update.step
        moved = np.zeros(len(self), np.bool_)
        if facts.update is not None:
            self._signal_at[facts.update.gradient_norm > 0.0] = step
            # Momentum and weight decay move what has no gradient: that is no proof.
            moved = facts.update.moved & ~facts.update.broken & (self._signal_at == step)
        if facts.copies is not None and facts.copies.followed and not facts.copies.still:
            moved[list(facts.copies.slots)] = True  # written back to by the loop, after the step of the copies
        self._enter("moved", moved, _able(facts) & (self._ran_at >= 0) & (self._ran_at == step), step)

    def _enter_forwards(self, facts: Facts) -> None:
        ran, trained, active = _who_ran(facts)
        if rows := {n: f"{n!r} in {on} of {total} rows" for f in facts.training_forwards for n, on, total in f.rows}:
            self._details["active"] = ", ".join(rows.values())
        # Whoever called what: where a gradient arrives, the tensor had a part in the loss.
        signal = facts.gradients.signal
        # Of adapters that take turns, a step may show the forward of one and the gradients of all.
        unseen = signal if trained is None else signal & ~(active if len(facts.expected) > 1 else trained)
        trained = signal if trained is None else trained | signal
        active = active | unseen
        used = {i for i, unit in enumerate(facts.units) if unit.base_weight_used}
        self._ran |= ran | signal | facts.slots_of_units(used | facts.ran_beside)
        self._somebody_ran |= bool(trained.any())
        self._signal_at[signal] = facts.step
        self._ran_at[trained] = facts.step
        if facts.stale_forward is not None:
            self._is_stale = facts.stale_forward[0]
        if facts.supervision is not None:
            self._supervision_seen = True
            self._enter("supervised", trained & (not facts.supervision.empty.all()), trained, facts.step)
        self._enter("active", active, trained, facts.step)
        self._enter("reached", signal, trained & facts.gradients.read & _able(facts), facts.step)
        owned = facts.slots.owned & trained
        if facts.moment in ("step", "skipped", "waiting"):
            self._enter("owned", owned, trained, facts.step)
        moved = self._columns["moved"].last
        stands = facts.history.put_back == 0
        sees = active & owned & (moved >= 0) & (moved < facts.step) & stands
        self._enter("seen", sees & (not self._is_stale), trained, facts.step)

    def enter_saves(self, saves: Iterable[SavedFact]) -> None:
        """Add files that were read back.

        Args:
            saves: How each compares with the live adapter.
        """
        for saved in saves:
            slots = [slot for slot in saved.slots if slot < len(self)]
            self._in_file[slots] = True
            column = self._columns["saved"]
            column.last[slots] = -1
            self._saved[saved.adapter] = _of_file(saved)
            self._details["saved"] = "; ".join(dict.fromkeys(self._saved.values()))
            absent = saved.missing or saved.empty or saved.differing or saved.shapes
            if saved.as_live and not (saved.unreadable or saved.why_not or absent):
                column.last[slots] = saved.step

    def of_file(self, run: ProofBook, saves: Iterable[SavedFact]) -> None:
        """Prove one file alone, by hand.

        Args:
            run: The proofs of the run, which know its tensors.
            saves: How the file compares.
        """
        self.begin(len(run))
        self._facts, self._trainable, self._ran = run._facts, run._trainable, run._ran
        self._somebody_ran = run._somebody_ran
        self.enter_saves(saves)

    # --- telling ----------------------------------------------------------------------------

    @property
    def _expected(self) -> Bools:
        """The slots that must be proven: idle ones and those that a method leaves frozen are not."""
        slots = self._facts.slots
        if not len(slots):  # no decision was made so far: only of files something is known
            return self._in_file
        frozen = ~self._trainable
        a, b = slots.of_role("A"), slots.of_role("B")
        # LoRA-FA trains B alone, from the start and everywhere.
        fixed = a & frozen if b.any() and frozen[a].all() and not frozen[b].any() else np.zeros(len(self), np.bool_)
        wanted: Bools = slots.intended & ~fixed
        return wanted

    def _names(self, slots: Bools) -> tuple[str, ...]:
        return tuple(self._facts.slots.names(slots)) if len(self._facts.slots) else ()

    @property
    def _idle(self) -> Bools:
        """Layers that ran in no forward, and rows of tokens that occurred in none, while others trained."""
        never = ~self._ran
        if len(self._facts.slots):
            never = never | (self._facts.slots.rows & ~self._facts.history.had_signal)
        return never & self._somebody_ran

    def applying(self) -> list[Claim]:
        """The claims that apply to this run, in the order of the way of a gradient."""
        there: list[Claim] = ["supervised"] if "supervised" in self._claims and self._supervision_seen else []
        there += [claim for claim in _STEPPED if claim in self._claims]
        if "agreed" in self._claims and self._facts.wrapping is not None:
            there.append("agreed")
        if "saved" in self._claims and self._in_file.any():
            there.append("saved")
        if "served" in self._claims and self._sampled:
            there.append("served")
        return there

    def fractions(self) -> dict[Claim, float]:
        """Of each claim, the fraction of the expected tensors for which it is proven."""
        wanted, idle = self._expected, self._idle
        found: dict[Claim, float] = {}
        for claim in self.applying():
            mine = wanted & (self._in_file if claim == "saved" else ~idle)
            number = int(mine.sum())
            found[claim] = float((self._holds(claim) & mine).sum() / number) if number else 0.0
        return found

    def _holds(self, claim: Claim) -> Bools:
        """What a claim is proven of; what the optimizer did once says nothing of a loop that goes on without it."""
        holds = self._columns[claim].holds
        if claim in ("reached", "moved", "seen") and len(self._facts.slots) == len(self):
            holds = holds & ~self._facts.frozen_later
        return holds & ~self._of_lapsed if claim in ("moved", "seen") else holds

    @property
    def _of_lapsed(self) -> Bools:
        lapsed = list(self._lapsed())
        found: Bools = np.isin(self._facts.slots.owner, lapsed) if lapsed else np.zeros(len(self), np.bool_)
        return found if len(found) == len(self) else np.zeros(len(self), np.bool_)

    @property
    def complete(self) -> bool:
        """Every claim that applies is proven for every expected tensor."""
        return all(fraction == 1.0 for fraction in self.fractions().values())

    def proofs(self, *, ended: bool) -> dict[Claim, Proof]:
        """What is proven, and for the rest why not.

        Args:
            ended: The run is over: what is missing now stays so.

        Returns:
            One entry for each claim that applies.
        """
        claims = self.applying()
        if "reached" in claims and len(self._facts.measured) and "gradient" in self._claims:
            claims.insert(claims.index("reached") + 1, "gradient")
        return {claim: self._proof(claim, ended=ended) for claim in claims}

    def _proof(self, claim: Claim, *, ended: bool) -> Proof:
        column, wanted = self._columns[claim], self._expected
        # A file must hold what is idle, too.
        idle = np.zeros(len(self), np.bool_) if claim == "saved" else wanted & self._idle
        expected = wanted & self._in_file if claim == "saved" else wanted & ~idle
        holds = self._holds(claim)
        missing = expected & ~holds
        observed = column.last[expected]
        return Proof(
            claim=claim,
            proven=int((expected & holds).sum()),
            expected=int(expected.sum()),
            idle=int(idle.sum()),
            step=int(observed.max()) if observed.size and observed.max() >= 0 else None,
            missing=self._names(missing),
            why=self._why(claim, missing, ended=ended) if missing.any() or not expected.any() else "",
            detail=self._details.get(claim, ""),
            sampled=claim == "gradient",
        )

    def _why(self, claim: Claim, missing: Bools, *, ended: bool) -> str:
        """The reasons in words, the one of most tensors first."""
        facts = self._facts
        if not len(facts.slots):
            return "no step was judged"
        if claim == "saved":
            return "; ".join(dict.fromkeys(self._saved.values()))
        if claim == "gradient":
            last = facts.responses[-1].why_not if facts.responses else None
            return last or "measured a part at a time, against a finite difference of the loss"
        if claim == "served":
            return (
                f"the sampler was another policy than the one that trains{self._diagnosis(missing, claim, ended=ended)}"
            )
        if claim == "agreed":
            return facts.why_alone or "the ranks did not hold, or did not apply, the same at the last exchange"
        if facts.why_not_owned and claim in ("owned", "reached", "moved", "seen"):
            return facts.why_not_owned
        if not self._somebody_ran:
            return facts.unobservable or _nothing_ran(*self._calls, backward=self._backward)
        if not missing.any():  # and nothing is expected either
            return "every tensor that should train is idle" if self._expected.any() else "no tensor is meant to train"
        left, parts = missing.copy(), []
        for holds, reason in self._reasons(claim):
            mine = left & holds()
            if mine.any():
                parts.append((int(mine.sum()), reason + self._diagnosis(mine, claim, ended=ended)))
                left &= ~mine
        parts.sort(key=lambda part: -part[0])
        return "; ".join(f"{count} {reason}" for count, reason in parts)

    def _reasons(self, claim: Claim) -> list[tuple[Callable[[], Bools], str]]:
        """What keeps a tensor from being proven, nearest cause first."""
        facts, columns = self._facts, self._columns
        history, slots = facts.history, facts.slots
        never = np.full(len(self), claim in ("moved", "seen"))
        reasons: list[tuple[Callable[[], Bools], str]] = [
            (lambda: ~slots.requires_grad, "frozen (requires_grad=False)"),
            (lambda: self._ran_at < 0, "not reached by a training forward so far"),
        ]
        if claim == "active":
            return [*reasons, (lambda: ~columns["active"].holds, "in layers that ran without the adapter")]
        if claim == "supervised":
            return [*reasons, (lambda: ~columns["supervised"].holds, "in forwards of which no token is supervised")]
        reasons += [(lambda: ~slots.owned, "in no optimizer")]
        if claim == "owned":
            return reasons
        return [
            *reasons,
            (lambda: _of_idle_optimizers(facts) | (history.reads == 0), "whose optimizer has not stepped"),
            (lambda: never & self._of_lapsed, "whose optimizer steps no more, although backward passes go on"),
            (lambda: history.missing > 0, "without a gradient (None)"),
            (lambda: (history.zero > 0) & ~history.had_signal, "with a gradient of exactly zero so far"),
            (lambda: history.zero > 0, "with a gradient of exactly zero"),
            (lambda: never & (history.rate_zero > 0), "with a learning rate of 0"),
            (lambda: never & (history.put_back > 0), "put back after each step"),
            (lambda: never & (facts.skipped_in_a_row > 0), "whose steps were skipped"),
            (lambda: never & (columns["moved"].last < 0), "that no step has moved so far"),
            (lambda: never & ~columns["moved"].holds, "that no step moves any more"),
            (lambda: never & self._is_stale, "whose forward went on with old values"),
            (lambda: never, "with no training forward since they moved"),
            (lambda: columns[claim].stale, "not observed any more"),
            (lambda: np.ones(len(self), np.bool_), "not observed so far"),
        ]

    def _diagnosis(self, slots: Bools, claim: Claim, *, ended: bool) -> str:
        codes = sorted({code for code in self._blamed[slots].tolist() if code})
        if codes:
            return f" ({', '.join(codes)})"
        if int(self._columns[claim].missed[slots].max()) >= PATIENCE:
            return " (no check explains this)"
        return ", and the run has ended" if ended else " (not yet)"


def _of_idle_optimizers(facts: Facts) -> Bools:
    steps = facts.steps_of
    idle = [number for number, made in enumerate(steps) if not made and max(steps) > 1]
    found: Bools = np.isin(facts.slots.owner, idle)
    return found


def _able(facts: Facts) -> Bools:
    """What could be renewed now: not what waits for its turn, or has lost its budget."""
    return facts.intended & facts.slots.requires_grad & ~facts.pruned


def _nothing_ran(with_gradients: int, without: int, *, backward: bool) -> str:
    if without and not with_gradients:
        return "every forward of the model ran without gradients (no_grad or inference_mode)"
    if with_gradients and not backward:
        return "no backward was called after any forward that was seen"
    if with_gradients:
        return "no gradient arrived at the output of any forward: the loss that is differentiated is not made of it"
    return "no training forward of this model was seen"


def _who_ran(facts: Facts) -> tuple[Bools, Bools | None, Bools]:
    """Whose layer ran in any forward, in a training forward (None where that is not seen), and actively in it."""
    units = len(facts.units)
    ran, active = np.zeros(units, np.bool_), np.zeros(units, np.bool_)
    trained: Bools | None = np.zeros(units, np.bool_)
    forwards = [f for f in facts.forwards if len(f.modes) == units]  # a layer may have been exchanged in between
    received = [f for f in forwards if f.received]
    for forward in forwards:
        if forward.calls is None:
            if forward.received and forward.holds_expected:  # compiled: only the states at its beginning are known
                active |= np.array([mode == "active" for mode in forward.modes], np.bool_)
                trained = None if trained is None else trained | True
                ran |= True
            continue
        called = forward.calls.total > 0
        ran |= called
        if forward.received:
            active |= forward.calls.active > 0
            trained = None if trained is None else trained | called
    if not received and facts.unobservable:
        trained = None
    unit = facts.slots.unit
    return ran[unit], None if trained is None else trained[unit], active[unit]


def _of_file(saved: SavedFact) -> str:
    where = saved.path.replace("\\", "/").rsplit("/", 2)[-2:]
    reason = saved.unreadable or saved.why_not or saved.why_no_values
    if not reason and (absent := (*saved.missing, *saved.empty, *saved.differing)):
        reason = f"{len(absent)} of {saved.tensors} tensors are missing or other than live"
    return "/".join(where) + (f": {reason}" if reason else "")
