"""LP302: the gradient of an adapter tensor is None."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import PERSISTENT, Check, Verdict, ok, pending, warn
from lora_probe_callbacks.checks.reachability._missing import judge_missing, unreached
from lora_probe_callbacks.facts import Facts

LONG = 4 * PERSISTENT  # a head may be warmed up alone, on outputs of the model


def judge(facts: Facts) -> Verdict:
    """Look for tensors without a gradient when the optimizer is about to step."""
    read = [i for i in facts.intended if facts.gradients and facts.gradients[i] is not None]
    if not read:
        return pending("no gradient was read at this decision")
    if facts.unobservable is None and not any(f.holds_expected for f in facts.training_forwards):
        return _only_without_grad(facts, read) or pending(
            "the model was not called in this step"
        )  # LP209 finds out who was
    called = facts.called_units
    ungraded_units = facts.ungraded_units
    lost = unreached(facts) or frozenset()
    missing = frozenset(
        i
        for i in read
        if not facts.gradients[i].present  # type: ignore[union-attr]
        and facts.slots[i].requires_grad
        and (called is None or facts.slots[i].unit in called)
        and i not in lost
    )
    if not missing:
        return ok()
    checkpointed = [f.why_unknown for f in facts.training_forwards if f.why_unknown and "Checkpoint" in f.why_unknown]
    ungraded = {facts.slots[i].unit for i in missing} <= ungraded_units
    fix = (
        "reentrant checkpointing drops the graph where none of its inputs requires gradients: pass use_reentrant=False, or call "
        "enable_input_require_grads() on the part that is checkpointed (a vision or audio tower has its own inputs)"
        if checkpointed or ungraded
        else ""
    )
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
        got=f"{len(missing)} of {len(read)} gradients None" + (f"; {checkpointed[0]}" if checkpointed else ""),
        expected="0",
        fix=fix,
    )


def _only_without_grad(facts: Facts, read: list[int]) -> Verdict | None:
    """Every call of the model was under no_grad, and the loss is made of something else."""
    missing = [i for i in read if facts.slots[i].requires_grad and not facts.gradients[i].present]  # type: ignore[union-attr]
    if not facts.forwards_without_grad or facts.forwards or facts.elsewhere or not missing:
        return None
    row = min(facts.history[i].missing for i in missing)
    if row < LONG:
        return pending(f"the model was called without gradients only, in {row} probed step(s): they may warm up a head")
    return warn(
        f"all {len(missing)} adapter tensors got no gradient (None) in {row} probed steps: every call of the model was under no_grad or "
        "inference_mode, and the loss trains something else",
        missing,
        cause="without gradients",
        got=f"{facts.forwards_without_grad} calls without gradients in this step, 0 with",
        expected="a call with gradients in every step",
        fix="if these steps are a warm-up of something else nothing is wrong; else take no_grad, inference_mode and "
        "set_grad_enabled(False) away from the forward that makes the loss",
    )


CHECK = Check(
    code="LP302",
    name="missing-gradient",
    what="The gradient of an adapter tensor is None when the optimizer is about to step, though its layer was called.",
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
    judge=judge,
)
