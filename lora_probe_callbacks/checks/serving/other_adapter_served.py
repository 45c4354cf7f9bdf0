"""LP813: another adapter is served."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail
from lora_probe_callbacks.checks.serving._served import each_served, measured
from lora_probe_callbacks.facts import Facts, ServedFact


def judge(facts: Facts) -> Verdict:
    """Look for targets that do something else than the adapter."""
    return each_served(facts, "other-adapter", _judge)


def _judge(served: ServedFact) -> Verdict:
    who = f"is the adapter {served.other!r} of this model, not" if served.other else "changes the base, but is not"
    more = "" if served.other else ", nor another one of this model, nor a checkpoint at hand"
    return fail(
        f"{served.target} {who} the trained adapter{more}",
        cause=served.target,
        got=measured(served),
        expected="slope 1",
    )


CHECK = Check(
    code="LP813",
    name="other-adapter-served",
    what="What was reloaded, merged or is served changes the base, and not as the trained adapter does. If it is another one of the model's, it is named.",
    why="Adapters are chosen by a name or a number, and all of them answer.",
    fix="Look at the name or id in the request and at the folder from which the engine has loaded it; a cache that is keyed by an id serves the adapter that had it before.",
    quiet="An earlier state of the same adapter is LP815 where a checkpoint of it is at hand.",
    needs=("serving",),
    judge=judge,
)
