"""LP502: the factor of BA is zero, or not alpha/r."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, skipped, some, warn
from lora_probe_callbacks.facts import Facts

NEAR = 1e-6  # relative: a factor that went through a record or through 32 bits


def judge(facts: Facts) -> Verdict:
    """Compare the factor of each unit with what its rank and alpha say."""
    pairs = {(u.scaling, u.natural) for u in facts.units}
    if all(got is None for got, _ in pairs):
        return skipped("no expected layer has a factor alpha/r")
    if not any(got == 0 or _apart(got, natural) for got, natural in pairs):
        return ok()
    if (moving := _moving(facts)) is not None:
        return moving
    known = [u for u in range(len(facts.units)) if facts.units[u].scaling is not None]
    zero = [u for u in known if facts.units[u].scaling == 0]
    names = [facts.units[u].name for u in zero]
    if zero and len(zero) == len(known):
        return fail(
            f"the scaling of all {len(zero)} adapted layers is 0: the adapter adds nothing and gets no gradient",
            facts.slots_of_units(zero),
            cause="zero",
            got="scaling 0",
            expected=_natural(facts, zero),
        )
    if zero:
        return warn(
            f"the scaling of {len(zero)} of {len(known)} adapted layers is 0: {some(names)}",
            facts.slots_of_units(zero),
            cause="zero",
            got="scaling 0",
            expected=_natural(facts, zero),
            fix="if these layers are switched off on purpose nothing is wrong; else look for set_scale(..., 0), scale_layer(0) and "
            "an alpha_pattern of 0",
        )
    other = [u for u in known if _apart(facts.units[u].scaling, facts.units[u].natural)]
    unit = facts.units[other[0]]
    return warn(
        f"the scaling of {len(other)} of {len(known)} adapted layers is {unit.scaling:g}, not {unit.natural:g} as their rank and alpha "
        f"say: {some([facts.units[u].name for u in other])}",
        facts.slots_of_units(other),
        cause="other",
        got=f"scaling {unit.scaling:g}",
        expected=_natural(facts, other),
        fix="if it was scaled on purpose, set lora_alpha so that it says so: a saved adapter is loaded with alpha/r (alpha/sqrt(r) under "
        "use_rslora); else call unscale_layer() after every scale_layer()",
    )


def _moving(facts: Facts) -> Verdict | None:
    """A factor that is warmed up begins at 0, or goes on to change: it is judged where it stays."""
    row = facts.factors_row
    if row is None or row > PERSISTENT or facts.moment == "end":
        return None
    known = [u for u in facts.units if u.scaling is not None]
    all_zero = all(u.scaling == 0 for u in known)
    if facts.factors_moved and not all_zero:
        return pending(f"the factor of BA has changed {row} look(s) ago: judged where it stays")
    if not facts.factors_moved and all_zero and all(u.natural for u in known):
        return pending("the factor of BA is 0 so far: it may be warmed up")
    return None


def _apart(got: float | None, natural: float | None) -> bool:
    return got is not None and natural is not None and abs(got - natural) > NEAR * max(abs(got), abs(natural))


def _natural(facts: Facts, units: list[int]) -> str:
    values = sorted({n for u in units if (n := facts.units[u].natural) is not None})
    shown = " or ".join(f"{v:g}" for v in values if v) or "alpha/r with an alpha above 0"
    return f"scaling {shown}" if any(values) else shown


CHECK = Check(
    code="LP502",
    name="wrong-scaling",
    what="The factor of BA in an adapted layer is 0, or is not alpha/r (alpha/sqrt(r) under rsLoRA). It fails if all of them are 0.",
    why="With a factor of 0 the forward is that of the base model and every adapter gradient is exactly zero. With another one the adapter "
    "that is saved is not the one that was trained: loading computes alpha/r anew.",
    fix="Look for lora_alpha=0, set_scale() and scale_layer() without unscale_layer().",
    quiet="A factor that is warmed up from 0, while it changes and in the first four steps; use_rslora, rank_pattern and alpha_pattern; AdaLoRA and tuners other than LoRA, which have no such factor.",
    judge=judge,
)
