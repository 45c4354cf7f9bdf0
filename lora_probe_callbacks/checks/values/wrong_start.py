"""LP504: a new adapter that is not the identity, or a restored one that is."""

from __future__ import annotations

from collections.abc import Sequence

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped, some, warn
from lora_probe_callbacks.facts import Facts, StartFact


def judge(facts: Facts) -> Verdict:
    """Compare the state in which training began with what was declared."""
    start = facts.start
    if start is None:
        return pending("no training forward has begun")
    if facts.rewrapped:
        return skipped("explained by LP107")  # a second wrap makes everything anew
    if not start.known:
        return skipped("no expected layer has a pair of A and B that can be read")
    if facts.reference is not None and start.moving:
        return _residual(facts, start.moving)
    plain, identity, changed = start.plain, start.identity, start.changed
    if not plain:
        return skipped("the initialisation takes BA out of the base weight: a fresh adapter is not zero by design")
    if facts.resumed is False:
        return _fresh(facts, changed, plain) if changed else ok()
    if facts.resumed and identity:
        return _lost(facts, identity, plain)
    if len(identity) == len(plain) and facts.resumed is None:
        return _step_without_adapter(facts, start, plain)
    new_run = facts.resumed is None and not start.framework_step and not start.optimizer_state
    if changed and facts.reference is not None and new_run:
        return _other_reference(facts, changed, plain)
    return ok()


def _names(facts: Facts, units: Sequence[int]) -> str:
    return some([facts.units[u].name for u in units])


def _fresh(facts: Facts, changed: list[int], plain: list[int]) -> Verdict:
    return fail(
        f"the new adapter is not the identity: BA is not zero in {len(changed)} of {len(plain)} adapted layers, {_names(facts, changed)}",
        facts.slots_of_units(changed),
        cause="fresh",
        got=f"BA other than 0 in {len(changed)} layers before the first step, with resumed=False",
        expected="BA = 0: the model starts as its base",
        fix="look for what initialises or loads weights after the adapter was attached (init_weights(), post_init(), to_empty(), "
        "init_lora_weights=False); if the adapter was restored, pass resumed=True",
    )


def _lost(facts: Facts, identity: list[int], plain: list[int]) -> Verdict:
    slots = facts.slots_of_units(identity)
    if len(identity) == len(plain):
        return fail(
            f"the restored adapter is a fresh one: BA is exactly zero in all {len(plain)} adapted layers",
            slots,
            cause="resumed",
            got="B = 0 everywhere, with resumed=True",
            expected="the values of the checkpoint",
            fix="load the checkpoint after the last get_peft_model() or add_adapter(), or use PeftModel.from_pretrained(base, path, "
            "is_trainable=True); see that set_peft_model_state_dict() reports no missing key",
        )
    return warn(
        f"{len(identity)} of {len(plain)} adapted layers of the restored adapter are fresh: {_names(facts, identity)}",
        slots,
        cause="resumed in part",
        got=f"B = 0 in {len(identity)} layers, with resumed=True",
        expected="the values of the checkpoint",
        fix="compare the keys of the checkpoint with the model's: if these layers never had a gradient (experts without a token) nothing is "
        "wrong; else their keys were renamed or are missing",
    )


def _step_without_adapter(facts: Facts, start: StartFact, plain: list[int]) -> Verdict:
    if not start.framework_step and not start.optimizer_state:
        return ok()
    state = f"framework step {start.framework_step}" if start.framework_step else "an optimizer with a state"
    return warn(
        f"training goes on at {state}, and the adapter is fresh: BA is exactly zero in all {len(plain)} adapted layers",
        facts.slots_of_units(plain),
        cause="step without adapter",
        got=f"B = 0 everywhere, and {state}",
        expected="the adapter of that step",
        fix="if this adapter is new, pass resumed=False; if the run was resumed, its adapter was not: load the checkpoint after the adapter "
        "was attached, and pass resumed=True",
    )


def _residual(facts: Facts, moving: list[int]) -> Verdict:
    return fail(
        f"the reference is not the base model: the initialisation has taken BA out of {len(moving)} base weights, "
        f"{_names(facts, moving)}, and with the adapters disabled that part is missing",
        facts.slots_of_units(moving),
        cause="residual",
        got="reference='disabled' beside an initialisation that changes the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)",
        expected="a reference that is the model of step 0",
        fix="keep a frozen copy of the fresh adapter as the reference (reference_adapters), use a second base model, or initialise with B = 0",
    )


def _other_reference(facts: Facts, changed: list[int], plain: list[int]) -> Verdict:
    return warn(
        f"the reference is not where the policy starts: {len(changed)} of {len(plain)} adapted layers are trained already, and disabling "
        "them gives the base model",
        facts.slots_of_units(changed),
        cause="reference",
        got=f"BA other than 0 in {len(changed)} layers at the first step, with reference='disabled'",
        expected="policy = reference at step 0, as with a fresh adapter",
        fix="if the loss should compare with the model that this run starts from, keep a frozen copy of the adapter and declare it "
        "(reference_adapters), or merge it into the base first; if it should compare with the base model, nothing is wrong",
    )


CHECK = Check(
    code="LP504",
    name="wrong-start",
    what="An adapter declared as new (resumed=False) is not the identity; one declared as restored (resumed=True) is; or with "
    "reference='disabled' the model without adapters is not where the policy starts. Without a declaration it warns of a fresh adapter "
    "in a run that goes on.",
    why="Loading copies nothing and says nothing when names differ, wrapping again makes everything anew, init_weights() after wrapping "
    "fills B. The loss is printed and falls in each of these runs.",
    fix="Attach the adapter, then load its weights, and do nothing to them afterwards; declare resumed.",
    quiet="PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA, whose BA is not zero by design; orthogonal factors; embeddings, where A is zero; a run "
    "that goes on against the base model; without a declaration a trained adapter is taken as it is.",
    threads=("huggingface/lerobot#3459", "huggingface/peft#1042", "huggingface/trl#1193", "tloen/alpaca-lora#72"),
    explained_by=("LP103", "LP107", "LP202", "LP503", "LP803"),
    needs=("initial state",),
    judge=judge,
)
