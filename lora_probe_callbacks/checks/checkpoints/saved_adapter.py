"""LP801: the saved file is not the trained adapter."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, skipped, some, warn
from lora_probe_callbacks.checks.checkpoints._saves import Values, each_save, values_of
from lora_probe_callbacks.facts import Facts, SavedFact


def judge(facts: Facts) -> Verdict:
    """Compare every saved file with the adapter as it was when it was saved."""
    return each_save(facts, _judge)


def _judge(save: SavedFact) -> Verdict | None:
    if save.other is not None or save.settings:
        return skipped("explained by LP802")
    return _form(save) or _names(save) or _values(save)


def _form(save: SavedFact) -> Verdict | None:
    if save.form != "model":
        return None
    if save.wrapped:
        return fail(
            f"{save.path} is a model for from_pretrained under the names of a wrapped one: a load takes none of its adapted weights",
            save.slots,
            cause="wrapped model",
            got=f"{len(save.wrapped)} names such as {some(save.wrapped, 2)}",
            expected="an adapter of PEFT, or a merged model",
            fix="call PeftModel.save_pretrained for the adapter, or merge_and_unload() before the whole model is saved",
        )
    return fail(
        f"{save.path} is the base model without the adapter {save.adapter!r}: every adapted weight in it is the base's",
        save.slots,
        cause="base model",
        got="adapted weights equal to the base's",
        expected="the adapter merged into them",
        fix="call merge_and_unload() and save the model that it returns, or save the adapter with PeftModel.save_pretrained",
    )


def _names(save: SavedFact) -> Verdict | None:
    where = f"the adapter {save.adapter!r} in {save.path}"
    if save.empty:
        return fail(
            f"{where} has no elements in {len(save.empty)} of its {save.tensors} tensors",
            save.slots,
            cause="empty",
            got=f"shape [0]: {some(save.empty)}",
            expected="whole tensors",
            fix="gather the parameters before saving: under ZeRO-3 deepspeed.zero.GatheredParameters or "
            "stage3_gather_16bit_weights_on_model_save, under FSDP a full state dict",
        )
    if save.wrapped:
        return fail(
            f"{where} stands under the names of a wrapper, which no other model has: {some(save.wrapped, 1)}",
            save.slots,
            cause="wrapper",
            got=f"{len(save.wrapped)} names with the name of a wrapper in them",
            expected="names as PEFT writes them",
            fix="save the module inside: accelerator.unwrap_model(model, keep_torch_compile=False), model._orig_mod or model.module",
        )
    if save.missing:
        return fail(
            f"{where} lacks {len(save.missing)} of its {save.tensors} tensors: {some(save.missing)}",
            save.slots,
            cause="missing",
            got=f"{save.tensors - len(save.missing)} tensors of it"
            + (f", and {some(save.foreign, 1)}" if save.foreign else ""),
            expected=f"{save.tensors}",
        )
    if save.converted:
        return skipped(f"{save.path}: converted to plain LoRA of twice the rank: other values by design")
    if save.shapes:
        name, saved, live = save.shapes[0]
        return fail(
            f"{where} has other shapes than the live one: {name} {saved}, live {live}",
            save.slots,
            cause="shape",
            got=f"{len(save.shapes)} other shapes",
            expected=f"{save.tensors} equal ones",
        )
    return None


_VALUES: dict[Values | None, tuple[str, str, str, str]] = {
    "untrained": ("untrained", "every B in it is zero", "every B exactly 0", "the B of the trained adapter"),
    "start": ("start", "it is the adapter as it was when training began", "the values of the start", "those of now"),
    "previous": (
        "stale",
        "it has not changed since the last save, and the adapter has",
        "the values of the last save",
        "those of now",
    ),
    "unrelated": (
        "unrelated",
        "its values have nothing in common with the trained ones",
        "unrelated values",
        "the live ones",
    ),
    "not finite": ("not finite", "it holds values that are not finite", "NaN or infinity", "the live, finite values"),
}


def _values(save: SavedFact) -> Verdict | None:
    where = f"the adapter {save.adapter!r} in {save.path}"
    values = values_of(save)
    if values == "partly":
        return fail(
            f"{where} differs from the live one in {len(save.differing)} of its {save.tensors} tensors, by {save.apart:.2g} of the norm of "
            f"all: {some(save.differing)}",
            save.slots,
            cause="partly",
            got=f"{len(save.differing)} tensors with other values",
            expected="the values of all as they were when it was saved",
        )
    if values in _VALUES and not save.before_steps:
        cause, words, got, expected = _VALUES[values]
        return fail(
            f"{where} is not the trained one: {words}",
            save.slots,
            cause=cause,
            got=f"{got} (relative distance {save.apart:.2g})",
            expected=expected,
        )
    if values in ("related", "fresh", *_VALUES):
        if save.before_steps:
            return skipped("explained by LP803: no step was made yet")
        if save.asked:
            return _apart(save, where)
        return skipped(
            f"{save.path}: its values differ from the live ones by {save.apart:.1%} of their norm and point the same way, "
            "as an average over steps or the adapter of another step does"
        )
    if save.why_no_values is not None:
        distance = f"; it differs from it by {save.apart:.2g} of its norm" if save.differing else ""
        return skipped(f"{save.path}: {save.why_no_values}{distance}; its names and shapes are right")
    if save.foreign:
        return warn(
            f"{where} holds {len(save.foreign)} tensors that stand for nothing in the model: {some(save.foreign, 2)}",
            cause="foreign",
            got=f"{len(save.foreign)} names that the model does not have",
            expected="0",
            fix="save with PeftModel.save_pretrained, which writes one adapter to a file; compare the names with model.state_dict()",
        )
    if save.rounded:
        return Verdict("pass", f"{where} holds the live values rounded to {save.rounded}")
    return ok()


def _apart(save: SavedFact, where: str) -> Verdict:
    """By how much, and where: the answer to a question."""
    far = ", ".join(f"{name} by {apart:.2g}" for name, apart in save.farthest)
    words = (
        f"{where} is not the live one: its values differ by {save.apart:.2g} of their norm in {len(save.differing)} of "
        f"{save.compared} tensors, most in {far}"
    )
    got, expected = f"relative distance {save.apart:.2g}", "the live values, or these rounded to the type of the file"
    if save.near:
        fix = f"{save.near} explains it; if that was not meant, save the adapter again"
        return warn(words, save.slots, cause="near", got=got, expected=expected, fix=fix)
    return fail(
        words,
        save.slots,
        cause="apart",
        got=got,
        expected=expected,
        fix="if the file should hold an average over steps or another step nothing is wrong with it; else save the adapter again",
    )


CHECK = Check(
    code="LP801",
    name="saved-adapter-differs",
    what="A file that was saved is read back and compared with the adapter as it was at that moment: by name, shape, type and values. It fails if tensors "
    "are missing or empty, names carry `_orig_mod.` or `module.`, every B is zero after training, or the values are those of another time or model.",
    why="Saving prints nothing about what it leaves out: sharded parameters are saved empty, a compiled model under names that no load finds, and "
    "a load that finds nothing is as silent.",
    fix="Save with PeftModel.save_pretrained on the module inside all wrappers, and load the file once into a fresh model before you rely on it.",
    quiet="Copies rounded to 16 bits; averages over steps (EMA, SWA), whose values are judged by hand alone; files older than the last step; checkpoints of a whole wrapped "
    "module, which are restored into the same; saved embeddings; PiSSA converted to LoRA. While training goes on, some elements of up to 32 tensors are compared, half of these in turn; by hand all of all.",
    threads=(
        "huggingface/trl#4416",
        "huggingface/peft#2892",
        "huggingface/peft#2450",
        "deepspeedai/DeepSpeed#7900",
        "huggingface/accelerate#3508",
        "huggingface/trl#6416",
        "huggingface/peft#1579",
        "MakazhanAlpamys/Soup#335",
        "huggingface/peft#3584",
    ),
    explained_by=("LP202",),
    needs=("files",),
    judge=judge,
)
