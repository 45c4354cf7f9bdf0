"""LP308: an operation without a backward drops the gradient."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, warn
from lora_probe_callbacks.facts import Facts, count, mask

# In eval mode, with gradients enabled, only the first layers' inputs need none: these few are packed, and harmless.
MOST = 0.5


def judge(facts: Facts) -> Verdict:
    """Look for adapter tensors behind an operation without a backward, and for packed 4-bit weights."""
    forwards = facts.training_forwards
    if not forwards:
        return pending(facts.unobservable or "no training forward was seen in this step")
    packed, four_bit = facts.packed
    behind = frozenset[int]().union(*(f.dropped for f in forwards))
    dropped = mask(behind, len(facts.slots)) & facts.intended
    hidden = any(f.why_unknown for f in forwards)
    if packed and (dropped.any() or (hidden and packed > MOST * four_bit)):
        concerned = dropped if dropped.any() else facts.intended
        return fail(
            f"{packed} of {four_bit} 4-bit weights are packed for inference: the training forward runs through a kernel without a backward, the "
            f"loss is right, and the gradients of {count(concerned)} adapter tensors lack the part that comes through it",
            facts.intended,
            cause="packed",
            got=f"{packed} of {four_bit} 4-bit weights packed for inference",
            expected="none in training",
            fix="a forward in eval mode without gradients (evaluation, generation) packed them, on a CPU with AVX512-BF16: call model.state_dict() after "
            "it, which puts them back, or leave the model in train mode for it (dropout set to 0), or train elsewhere (bitsandbytes 0.50)",
        )
    if dropped.any():
        return warn(
            f"{count(dropped)} adapter tensors lie behind an operation without a backward, which passes no gradient on",
            dropped,
            got=f"an operation that torch knows no backward of, before {count(dropped)} tensors",
            expected="operations with a backward",
            fix="torch names the operation in a warning at the first backward; if its gradient is meant to be zero nothing is wrong, else register an "
            "autograd kernel for it or use another implementation",
        )
    if hidden:
        return pending("; ".join(sorted({f.why_unknown for f in forwards if f.why_unknown})))
    return ok()


CHECK = Check(
    code="LP308",
    name="dropped-gradient",
    what="Between the loss and adapter tensors lies an operation without a backward: it fails for 4-bit weights that bitsandbytes has packed for inference, "
    "and warns for others.",
    why="torch passes no gradient through such an operation and warns once. What arrives by other ways (residuals, LoRA beside the frozen layer) looks like "
    "a gradient, and the loss is right.",
    fix="Use kernels that are made for training, and leave no layer in a state that is made for inference.",
    quiet="Operations whose result no adapter tensor makes; graphs that cannot be walked, unless most 4-bit weights are packed.",
    judge=judge,
)
