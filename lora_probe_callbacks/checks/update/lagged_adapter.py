"""LP408: an adapter that should follow the trained one stands still."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, skipped, warn
from lora_probe_callbacks.facts import Facts

LONG, LONG_STEPS = 4 * PERSISTENT, 100  # a copy may be made anew only once in so many steps


def judge(facts: Facts) -> Verdict:
    """Look for lagged adapters that are bit-equal while the trained one moves."""
    lagged = [o for o in facts.others if o.declared == "lagged"]
    if not lagged:
        return skipped("no lagged adapter was declared")
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


CHECK = Check(
    code="LP408",
    name="lagged-adapter-still",
    what="An adapter that was declared as lagged is bit-equal over probed steps in which the trained one moved. It fails if something "
    "wrote to it each time, and warns after a long time, or after three steps in 16 bits.",
    why="(1 - decay) times the difference is below half a last digit of float16 or bfloat16: every update of the average is rounded away, "
    "and the teacher stays what it was.",
    fix="Keep the lagged adapter in float32, or average in float32 and cast once.",
    quiet="Averages that move; copies that are made once in many steps; steps in which the trained adapter stands still.",
    threads=("AndreasBergmeister/ram#6",),
    judge=judge,
)
