"""LP408: an adapter that should follow the trained one stands still."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, skipped, some, warn
from lora_probe_callbacks.facts import Facts, OtherAdapter

LONG, LONG_STEPS = 4 * PERSISTENT, 100  # a copy may be made anew only once in so many steps


def judge(facts: Facts) -> Verdict:
    """Look for lagged adapters that are bit-equal while the trained one moves."""
    lagged = [o for o in facts.others if o.declared == "lagged"]
    if not lagged:
        return skipped("no lagged adapter was declared")
    for one in lagged:
        if one.astray or one.behind:
            return _in_part(facts, one)
    behind = max(lagged, key=lambda o: (o.written, o.still))
    if not behind.still:
        return (
            ok()
            if any(o.ever_changed for o in lagged) or facts.step >= PERSISTENT
            else pending("no update was seen yet")
        )
    got = f"0 of {behind.tensors} tensors changed in {behind.still} probed steps in a row" + (
        ", in 16 bits" if behind.half else ""
    )
    expected = f"a step towards {list(facts.expected)}, which moved in each of them"
    if behind.written >= PERSISTENT - 1:
        return fail(
            f"lagged adapter {behind.name!r} does not follow: it was written to in {behind.written} probed steps and not one bit changed",
            cause=behind.name,
            got=got,
            expected=expected,
        )
    over = facts.step - behind.still_since >= LONG_STEPS and behind.still >= LONG
    if over or (behind.half and behind.still >= PERSISTENT - 1):
        return warn(
            f"lagged adapter {behind.name!r} stands still: not one bit changed in {behind.still} probed steps",
            cause=behind.name,
            got=got,
            expected=expected,
            fix="if it is copied anew only once in many steps nothing is wrong; else look whether anything updates it"
            + (", and keep it in float32: a step below half a last digit is rounded away" if behind.half else ""),
        )
    return pending(f"lagged adapter {behind.name!r} has not moved in {behind.still} probed step(s)")


def _in_part(facts: Facts, one: OtherAdapter) -> Verdict:
    """Some of its tensors follow, or all follow something else."""
    if one.astray:
        return fail(
            f"lagged adapter {one.name!r} follows other tensors: {len(one.astray)} of {one.tensors} move away from those of "
            f"{list(facts.expected)} in the same places: {some(one.astray)}",
            cause=one.name,
            got=f"{len(one.astray)} tensors farther from the trained ones after every write",
            expected=f"a step towards {list(facts.expected)}, tensor by tensor",
            fix="pair the tensors by name, not by their order",
        )
    report = fail if 2 * len(one.behind) >= one.tensors or not one.half else warn
    return report(
        f"lagged adapter {one.name!r} follows in part: {len(one.behind)} of {one.tensors} tensors stand still while it is written to, "
        f"{one.lost:.0%} of what should move is lost: {some(one.behind)}",
        cause=one.name,
        got=f"{one.lost:.1%} of the elements that are far from the trained ones have not changed in three looks"
        + (", in 16 bits" if one.half else ""),
        expected=f"a step towards {list(facts.expected)}",
        fix="keep the lagged adapter in float32: a step below half a last digit is rounded away"
        if one.half
        else "let every tensor of the lagged adapter take part in the average",
    )


CHECK = Check(
    code="LP408",
    name="lagged-adapter-still",
    what="An adapter that was declared as lagged is bit-equal over probed steps in which the trained one moved. It fails if something "
    "wrote to it each time, and warns after a long time, or after three steps in 16 bits. The same tensor by tensor: it fails if half of them stand still while "
    "others are written, though the trained ones are far away, or if they move away from those, as when tensors are paired by their order.",
    why="(1 - decay) times the difference is below half a last digit of float16 or bfloat16: every update of the average is rounded away, "
    "and the teacher stays what it was.",
    fix="Keep the lagged adapter in float32, or average in float32 and cast once.",
    quiet="Averages that move; copies that are made once in many steps; steps in which the trained adapter stands still.",
    threads=("AndreasBergmeister/ram#6",),
    judge=judge,
)
