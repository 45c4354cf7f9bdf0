"""LP404: a tensor moved that must stay frozen."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped, some, warn
from lora_probe_callbacks.facts import Facts, count

DRIFT_WARN, DRIFT_FAIL = 0.005, 0.02  # root mean square of the change over that of the weight
CODES_WARN = 0.01  # fraction of quantised codes that changed: a single merge changes more, so it never fails


def judge(facts: Facts) -> Verdict:
    """Look for references, idle adapters, declared tensors and base weights that changed."""
    if facts.moment == "start" or (facts.moment == "end" and not facts.ever_stepped):
        return pending("no step was made yet")
    for other in facts.others:
        if not other.changed:
            continue
        if other.declared == "reference":
            return fail(
                f"reference adapter {other.name!r} moved in the last step: {len(other.changed)} of {other.tensors} tensors, {some(other.changed)}",
                cause=other.name,
                of_update=True,
                got=f"{len(other.changed)} tensors changed, {other.owned} in an optimizer",
                expected="0",
            )
        if other.declared is None and other.owned and not other.active_now:
            return fail(
                f"adapter {other.name!r} is not active and moved all the same: the optimizer owns {other.owned} of its tensors and steps them by "
                "momentum and weight decay",
                cause=other.name,
                of_update=True,
                got=f"{len(other.changed)} of {other.tensors} tensors changed in a step in which the adapter was inactive",
                expected="0",
                fix="give the optimizer only what trains, or call zero_grad(set_to_none=True), so that tensors without a gradient are passed over",
            )
    # What is not finite counts as moved though it may be as it was; LP501 speaks of that.
    update = facts.update
    if update is not None and (moved := facts.slots.frozen_by_intent & update.moved & ~update.broken).any():
        return fail(
            f"{count(moved)} adapter tensors that were declared frozen moved: {some(facts.slots.names(moved))}",
            moved,
            cause="frozen",
            of_update=True,
            got=f"{count(moved)} moved",
            expected="0",
        )
    return _drift(facts)


def _drift(facts: Facts) -> Verdict:
    drift = facts.base_drift
    if drift is None or facts.trainable_bases:
        return ok()
    if drift.quantised and facts.packed[0]:
        return skipped("4-bit weights are packed for inference, in which their codes stand in another order")
    least, most = (CODES_WARN, 2.0) if drift.quantised else (DRIFT_WARN, DRIFT_FAIL)
    if drift.relative < least:
        return ok()
    report = fail if drift.relative >= most else warn
    return report(
        f"the frozen base weight of {drift.layer} has drifted by {drift.relative:.1%} since training began",
        cause="base",
        got=f"relative change {drift.relative:.2e}" + (" of its quantised codes" if drift.quantised else ""),
        expected=f"below {least:g}",
        fix="merge_adapter() and unmerge_adapter() do not give a 16-bit or quantised weight back exactly, and each cycle adds to the error: sync "
        "or generate from a merged copy, or keep the weights aside and restore them",
    )


CHECK = Check(
    code="LP404",
    name="frozen-tensor-moved",
    what="A reference adapter, an inactive adapter that the optimizer owns, a tensor declared frozen, or the base weight under an adapter changes.",
    why="Zero gradients are not None: momentum and weight decay go on. Merging and unmerging in 16 bits rounds the base weight every time. Nothing prints this.",
    fix="Leave what must not move out of the optimizer; keep a copy of what is merged.",
    quiet="EMA and lagged adapters that follow by themselves; restarts that merge the adapter into the base and make A anew (ReLoRA); the rounding of a few merges (below 0.5% it passes, from 2% it fails).",
    threads=("NVIDIA-NeMo/Speech#5086", "huggingface/trl#6688"),
    explained_by=("LP207",),
    judge=judge,
)
