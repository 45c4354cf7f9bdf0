"""LP601: something that was asked for owns no adapter."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, some, warn
from lora_probe_callbacks.facts import Facts


def judge(facts: Facts) -> Verdict:
    """Compare declared and configured names with the adapted modules."""
    coverage = facts.coverage
    if coverage is None:
        return pending("no training forward has begun")
    missing = [part for part, found in coverage.expected if not found]
    if missing:
        return fail(
            f"no adapted module has {some([repr(p) for p in missing])} in its name",
            cause="expected",
            got=f"0 of {len(facts.units)} adapted modules match {missing}",
            expected=f"an adapted module for each of {[part for part, _ in coverage.expected]}",
            fix="compare target_modules with the names in model.named_modules(): a name of several that matches nothing is passed over in "
            "silence, and weights that are no module of their own need target_parameters",
        )
    # What was declared settles what is guessed: all that counts is adapted.
    unmet = coverage.unmet if not coverage.expected else ()
    if unmet:
        first = unmet[0]
        names = [request.name for request in unmet if request.argument == first.argument]
        there = "modules of that name exist and carry no adapter" if first.exists else "the model has no such module"
        return warn(
            f"{first.argument} asks for {some([repr(n) for n in names])}, and nothing of that name is adapted",
            cause=first.argument,
            got=f"{there}; {len(facts.units)} adapted modules by the other names",
            expected=f"every name in {first.argument} matches, or is left out",
            fix=f"if the list is meant for several architectures nothing is wrong: take {names[0]!r} out, or declare what counts with "
            "expect_targets=(...), which settles it; else compare it with the names in model.named_modules()",
        )
    if coverage.sparse and not coverage.expected:
        stack, adapted, total = coverage.sparse[0]
        return warn(
            f"only {adapted} of the {total} layers in {stack} carry an adapter",
            cause="sparse",
            got=f"{adapted} of {total} layers",
            expected="most layers, or layers_to_transform=[...]",
            fix="the projections have other names in the other layers, as in hybrid models: add them to target_modules; if these few are meant, "
            "pass layers_to_transform, or expect_targets=(...), which settles it",
        )
    return ok()


CHECK = Check(
    code="LP601",
    name="unmet-target",
    what="A name in expect_targets owns no adapted module: it fails. A name in target_modules, target_parameters or modules_to_save matches "
    "nothing, or fewer than a quarter of the layers of a stack are adapted: it warns.",
    why="PEFT raises only if the whole list matches nothing. A typo, the names of another architecture, a tower with other names and a "
    "wrapper that filters names all pass in silence, and what is adapted learns.",
    fix="Compare target_modules with model.targeted_module_names, and declare what must be covered with expect_targets.",
    quiet="Heads that PEFT adds for a task; exclude_modules, layers_to_transform and regular expressions; fused experts that PEFT turns into "
    "target_parameters; projections that only the attention layers of a hybrid model have, in a quarter of them at least.",
    threads=(
        "huggingface/peft#1959",
        "huggingface/peft#3554",
        "huggingface/peft#1024",
        "hiyouga/LlamaFactory#10790",
        "unslothai/unsloth#9331",
    ),
    needs=("coverage",),
    judge=judge,
)
