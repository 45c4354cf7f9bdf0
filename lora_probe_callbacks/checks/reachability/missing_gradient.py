"""LP302: the gradient of an adapter tensor is None."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, fail, ok, pending, some, warn
from lora_probe_callbacks.checks.reachability._missing import judge_missing, unreached
from lora_probe_callbacks.facts import Bools, Facts, count

_INPUTS = (
    "reentrant checkpointing drops the graph where none of its inputs requires gradients: pass use_reentrant=False, or call "
    "enable_input_require_grads() on the part that is checkpointed (a vision or audio tower has its own inputs)"
)
LONG = 4 * PERSISTENT  # a head may be warmed up alone, on outputs of the model


def judge(facts: Facts) -> Verdict:
    """Look for tensors without a gradient when the optimizer is about to step."""
    read = facts.intended & facts.gradients.read
    if not read.any():
        return pending("no gradient was read at this decision")
    if facts.unobservable is None and not any(f.holds_expected for f in facts.training_forwards):
        return _only_without_grad(facts, read) or pending(
            "the model was not called in this step"
        )  # LP209 finds out who was
    missing = read & facts.gradients.missing & facts.slots.requires_grad
    if facts.called_slots is not None:
        missing &= facts.called_slots
    lost = unreached(facts)
    if lost is not None:
        missing &= ~lost
    if not missing.any():
        return ok() if (read & facts.gradients.present).any() else pending("no gradient that should be there was read")
    return _cut(facts, read, missing) or _missing(facts, read, missing)


def _cut(facts: Facts, read: Bools, missing: Bools) -> Verdict | None:
    """Reentrant checkpoints without an input that requires gradients have no backward: nobody needs to wait for it."""
    units = frozenset[int]().union(*(f.cut for f in facts.training_forwards if f.received))
    cut = missing & facts.slots_of_units(units)
    if not cut.any():
        return None
    return fail(
        f"{count(cut)} adapter tensors ({some(facts.slots.names(cut))}) got no gradient (None), although the layers ran: in a reentrant "
        "checkpoint none of whose inputs requires gradients",
        cut,
        got=f"{count(cut)} of {count(read)} gradients None",
        expected="0",
        fix=_INPUTS,
    )


def _missing(facts: Facts, read: Bools, missing: Bools) -> Verdict:
    checkpointed = [f.why_unknown for f in facts.training_forwards if f.why_unknown and "Checkpoint" in f.why_unknown]
    ungraded = not (missing & ~facts.slots_of_units(facts.ungraded_units)).any()
    fix = _INPUTS if checkpointed or ungraded else ""
    calls = (
        f"; the model was called {facts.forwards_without_grad} times without gradients"
        if facts.forwards_without_grad
        else ""
    )
    return judge_missing(
        facts,
        missing,
        "{who} got no gradient (None), although the layers ran"
        + (", without gradients enabled, inside the training forward" if ungraded else "")
        + calls,
        got=f"{count(missing)} of {count(read)} gradients None" + (f"; {checkpointed[0]}" if checkpointed else ""),
        expected="0",
        fix=fix,
    )


def _only_without_grad(facts: Facts, read: Bools) -> Verdict | None:
    """Every call of the model was under no_grad, and the loss is made of something else."""
    missing = read & facts.gradients.missing & facts.slots.requires_grad
    if not facts.forwards_without_grad or facts.forwards or facts.elsewhere or not missing.any():
        return None
    row = int(facts.history.missing[missing].min())
    nothing = facts.no_gradient_at_all  # not even of something else that these steps may train
    if row < (PERSISTENT if nothing else LONG):
        return pending(f"the model was called without gradients only, in {row} probed step(s): they may warm up a head")
    what = (
        "nothing else has a gradient either: the loss carries no graph" if nothing else "the loss trains something else"
    )
    settle = "" if nothing else "if these steps are a warm-up of something else nothing is wrong; else "
    folk = "; loss.requires_grad_(True) silences the error and trains nothing" if nothing else ""
    report = fail if nothing else warn
    return report(
        f"all {count(missing)} adapter tensors got no gradient (None) in {row} probed steps: every call of the model was under no_grad or "
        f"inference_mode, and {what}",
        missing,
        cause="without gradients",
        got=f"{facts.forwards_without_grad} calls without gradients in this step, 0 with",
        expected="a call with gradients in every step",
        fix=f"{settle}take no_grad, inference_mode and set_grad_enabled(False) away from the forward that makes the loss{folk}",
    )


CHECK = Check(
    code="LP302",
    name="missing-gradient",
    what="The gradient of an adapter tensor is None when the optimizer is about to step, though its layer was called; or the forwards of three steps ran under no_grad and requires_grad_(True) was set on what they returned.",
    why="Optimizers pass over None without a word. One trainable tensor elsewhere (a head, a fusion layer) is enough for backward() to "
    "succeed.",
    fix="See that the loss's backward() runs before the step, that nothing calls zero_grad() in between, and that the layers do not run "
    "under no_grad.",
    quiet="Inactive adapters, layers that did not run in this batch. A part of the tensors is judged over four probed steps.",
    threads=(
        "locuslab/open-unlearning#178",
        "huggingface/transformers#25841",
        "2U1/Qwen-VL-Series-Finetune#193",
        "huggingface/trl#2486",
    ),
    explained_by=(
        "LP101",
        "LP102",
        "LP103",
        "LP104",
        "LP105",
        "LP106",
        "LP201",
        "LP202",
        "LP203",
        "LP209",
        "LP301",
        "LP308",
    ),
    needs=("owned",),
    sets_ranks_apart=True,
    judge=judge,
)
