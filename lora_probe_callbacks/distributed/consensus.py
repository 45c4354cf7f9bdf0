"""How the ranks of one run come to one decision: what is told, what is heard, and what they make of it.

They exchange at the same decisions: whether there is one depends on the number of the step and the
cadence alone. A rank whose probe is broken takes part and has nothing to say. What is found before the
first forward waits for the first step (ranks may reach that forward at different times, and one may be
waited for in it), and a rank that is left by an exception exchanges nothing: it says so where the others
see it without waiting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal

from torch import nn

from lora_probe_callbacks.checks._base import Need, Verdict, some
from lora_probe_callbacks.checks._catalogue import all_checks, explain
from lora_probe_callbacks.distributed.transport import AgreementLostError, Ranks
from lora_probe_callbacks.distributed.wire import decode, encode
from lora_probe_callbacks.facts import Facts, RankFacts, RankReport, RanksFact
from lora_probe_callbacks.observe.device.step_reader import Readings
from lora_probe_callbacks.observe.model.owners import Owners
from lora_probe_callbacks.observe.model.targets import Targets
from lora_probe_callbacks.observe.model.wrappers import DataParallel, data_parallel
from lora_probe_callbacks.observe.model.wrapping import wrapping

__all__ = ["Agreement", "agreed"]

_BAD = ("warn", "fail")


class Agreement:
    """The ranks of one run, as one of them sees them.

    Args:
        codes: Of the checks that this rank was asked for.
        on_lost: Called with the reason and the facts when the ranks do not decide together any more.
    """

    def __init__(self, codes: Iterable[str], on_lost: Callable[[str, Facts], None]) -> None:
        self._codes = frozenset(codes)
        self._on_lost = on_lost
        self._ranks = Ranks()
        self._parallel: DataParallel | None = None
        self._synced = True  # the last training forward was outside no_sync
        self._held: dict[str, Verdict] = {}  # found at the start, and not yet told to the other ranks
        self._equal_at_start: bool | None = None  # the adapter tensors of all ranks
        self._differed = False  # their gradients, when they were last compared
        self._causes: frozenset[str] = frozenset()  # what was found so far and explains that ranks differ

    @property
    def several(self) -> bool:
        """The ranks decide together, or will try to."""
        return self._ranks.several

    def enter(self, roots: Iterable[nn.Module]) -> None:
        """Say that this rank runs a probe, and look for what wraps its model. Waits for nobody.

        Args:
            roots: What is trained.
        """
        self._ranks.enter()
        if self._ranks.world > 1:
            self._parallel = data_parallel(roots)

    def leave(self, reason: str) -> None:
        """Tell the others, without waiting, that this rank takes part no longer."""
        self._ranks.leave(reason)

    def close(self) -> None:
        """Give back what was taken for the exchange."""
        self._ranks.close()

    def forward_begins(self) -> None:
        """Take note of whether the gradients of this training forward will be reduced."""
        if self._parallel is not None:
            self._synced = self._parallel.syncs

    def facts(self, targets: Targets, owners: Owners, called: set[int], readings: Readings) -> RankFacts:
        """What the others should know of this rank.

        Args:
            targets: What is expected to train.
            owners: Who owns it.
            called: Ids of the modules that ran in training forwards.
            readings: What came to the host.

        Returns:
            The facts, which are empty if there is one process. The sums over shards need all other facts.
        """
        if self._ranks.world < 2:
            return RankFacts()
        uneven = "the inputs of the ranks are uneven (Join): every rank decides by itself"
        return RankFacts(
            wrapping=wrapping(targets, owners, self._parallel, called, synced=self._synced),
            shards=owners.shards(),
            tensor_sample=readings.tensor_sample,
            gradient_sample=readings.gradient_sample,
            why_alone=uneven if self._joining else self._ranks.why_alone,
        )

    def decide(
        self,
        facts: Facts,
        verdicts: Mapping[str, Verdict],
        *,
        broken: bool,
        judge: Callable[[Facts], Mapping[str, Verdict]],
    ) -> tuple[Facts, dict[str, Verdict]]:
        """Hear the other ranks, and come to the verdicts that all of them come to.

        Args:
            facts: Of this rank.
            verdicts: Code to verdict of this rank.
            broken: Its probe has stepped aside.
            judge: The verdicts between ranks, on facts that hold what all of them have sent.

        Returns:
            The facts with what was heard, and the verdicts.
        """
        if facts.moment == "start":
            self._held = {code: v for code, v in verdicts.items() if v.status in _BAD}
            return facts, {code: v for code, v in verdicts.items() if code not in self._held}
        mine, self._held = explain({**verdicts, **self._held}), {}
        ranks = self._ranks
        facts = dataclasses.replace(facts, shard_sums=facts.sums_over(facts.shards, others=0.0))
        message = encode(facts, mine, broken=broken)
        in_need = any(v.status == "fail" for v in mine.values())
        if in_need:
            ranks.post(message)
        reports = {ranks.rank: decode(message)}
        if facts.moment == "exception":
            self._hear_posted(reports)
        elif not self._joining:
            try:
                reports = self._exchanged(message, in_need=in_need)
                facts = self._with_ranks(facts, reports)
                if not broken:
                    mine |= judge(facts)
                    self._causes |= {code for code in _codes("ranks") if _bad(mine, code)}
                if facts.moment != "end" and any(r.moment == "end" for r in reports.values()):
                    ranks.leave("a rank has ended its run before the others")
            except AgreementLostError as lost:
                self._hear_posted(reports)
                self._on_lost(f"the ranks do not decide together: {lost}", facts)
        heard = {r: _only(report, self._codes) for r, report in reports.items()}
        return facts, agreed(mine, heard, ranks.world)

    # --- inside -----------------------------------------------------------------------------

    @property
    def _joining(self) -> bool:
        return self._parallel is not None and self._parallel.joining

    def _exchanged(self, message: bytes, *, in_need: bool) -> dict[int, RankReport]:
        messages = self._ranks.exchange(message, in_need=in_need)
        try:
            return dict(enumerate(map(decode, messages)))
        except ValueError as error:
            self._ranks.leave(str(error))
            raise AgreementLostError(str(error)) from error

    def _hear_posted(self, reports: dict[int, RankReport]) -> None:
        """What a rank has found that will not come to a decision any more."""
        posted = self._ranks.posted()
        if posted is not None and posted[0] not in reports:
            reports[posted[0]] = decode(posted[1])

    def _with_ranks(self, facts: Facts, reports: Mapping[int, RankReport]) -> Facts:
        told = tuple(reports[r] for r in range(self._ranks.world))
        failed = {c for r in told for c, status in r.bad if status == "fail"} - _codes("ranks")
        warned = {c for r in told for c, _ in r.bad if c in {k.code for k in all_checks() if k.sets_ranks_apart}}
        ranks = RanksFact(
            told,
            self._ranks.rank,
            differed_before=self._differed,
            causes=tuple(sorted(self._causes)),
            failed=tuple(sorted(failed)),
            found=tuple(sorted(failed | warned)),
        )
        if self._equal_at_start is None:
            self._equal_at_start = ranks.tensors_differ is None
        ranks = dataclasses.replace(ranks, equal_at_start=self._equal_at_start)
        if ranks.stepping:
            self._differed = ranks.gradients_differ is not None
        self._causes |= failed
        if ranks.tensors_differ is not None or ranks.gradients_differ is not None:
            self._causes |= set(ranks.found)
        mine = ranks.reports[ranks.rank]
        sums = facts.sums_over(dict.fromkeys(facts.shards, 0.0))
        for report in ranks.reports:
            if report.first == mine.first:
                sums += report.shards
        return dataclasses.replace(facts, ranks=ranks, sums=sums)


def _codes(need: Need) -> set[str]:
    """The checks that cannot do without something."""
    return {check.code for check in all_checks() if need in check.needs}


def _bad(verdicts: Mapping[str, Verdict], code: str) -> bool:
    return code in verdicts and verdicts[code].status in _BAD


def _only(report: RankReport, codes: Collection[str]) -> RankReport:
    """Without what this rank was not asked to judge."""
    return dataclasses.replace(report, bad=tuple((c, s) for c, s in report.bad if c in codes))


def agreed(verdicts: Mapping[str, Verdict], reports: Mapping[int, RankReport], world: int) -> dict[str, Verdict]:
    """The verdicts of one rank, and what the others have found.

    Args:
        verdicts: Code to verdict of this rank.
        reports: Rank to what it has sent; those that are known.
        world: Number of ranks.

    Returns:
        Code to verdict; what fails or warns is the same on all ranks, and says on which it was seen.
    """
    result = dict(verdicts)
    for code in [check.code for check in all_checks()]:
        seen = {rank: status for rank, r in sorted(reports.items()) for c, status in r.bad if c == code}
        if not seen:
            continue
        status: Literal["warn", "fail"] = "fail" if "fail" in seen.values() else "warn"
        mine = verdicts.get(code)
        base = mine if mine is not None and mine.status in ("warn", "fail") else Verdict(status)
        told = next((r for rank, r in reports.items() if rank in seen and (r.words or ("",))[0] == code), None)
        if told is not None and told.words is not None:
            _, message, got, expected, cause = told.words
            evidence = {**base.evidence, "got": got, "expected": expected}
            base = dataclasses.replace(base, message=message, evidence=evidence, cause=cause, seen=told.seen)
        elif not base.message:
            base = dataclasses.replace(base, message=f"reported by {_ranks(list(seen), world)}, whose report says more")
        fix = base.fix or next(check.fix for check in all_checks() if check.code == code)
        evidence = {**base.evidence, "seen on": _ranks(list(seen), world)}
        # Another rank may have seen it in another step than its message says: one for all.
        when = told.seen if told is not None else None
        result[code] = dataclasses.replace(base, status=status, evidence=evidence, fix=fix, seen=when)
    return result


def _ranks(ranks: Sequence[int], world: int) -> str:
    if len(ranks) == world:
        return f"all {world} ranks"
    return f"rank {some([str(r) for r in ranks], 8)} of {world}"
