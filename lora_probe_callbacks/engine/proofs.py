"""For which adapter tensors has each claim been proven, and since when not?

A proof is given by an observation, never by the absence of a complaint, and it ages: where it could have been renewed
and is not, it stops counting after ``PATIENCE`` probed steps. A tensor that rests for longer and comes back (layers
that train in turns, batches without a signal) shows a pattern; from then on it may rest twice as long as it has.

All of it is columns over the slots, so that a run with thousands of tensors costs a few array operations more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from lora_probe_callbacks.checks._base import Check, Verdict
from lora_probe_callbacks.engine.proof_gaps import PATIENCE, Column, Gap
from lora_probe_callbacks.facts import Bools, Facts, SavedFact
from lora_probe_callbacks.facts.proof import CLAIMS, Claim, Proof

__all__ = ["PATIENCE", "ProofBook", "claims_of"]

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
        self._columns = {claim: Column.of(size) for claim in CLAIMS}
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
        if claim == "saved" and len(self._facts.slots):
            return "; ".join(dict.fromkeys(self._saved.values()))
        gap = Gap(
            claim=claim,
            facts=self._facts,
            columns=self._columns,
            ran_at=self._ran_at,
            blamed=self._blamed,
            lapsed=self._of_lapsed,
            stale=self._is_stale,
            somebody_ran=self._somebody_ran,
            nothing_ran=_nothing_ran(*self._calls, backward=self._backward),
            ended=ended,
        )
        return gap.why(missing, self._expected)


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
