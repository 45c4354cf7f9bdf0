"""LP802: the saved file holds another adapter, or settings that are not the live ones."""

from __future__ import annotations

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, skipped
from lora_probe_callbacks.checks.checkpoints._saves import each_save
from lora_probe_callbacks.facts import Facts, SavedFact


def judge(facts: Facts) -> Verdict:
    """Whose values are in the file, and what would a reload compute with them?"""
    return each_save(facts, _judge)


def _judge(save: SavedFact) -> Verdict | None:
    if save.form != "adapter":
        return None
    if save.other is not None:
        return fail(
            f"{save.path} holds the adapter {save.other!r}, and {save.adapter!r} is the one that trains",
            save.slots,
            cause="adapter",
            got=f"the values of {save.other!r}",
            expected=f"those of {save.adapter!r}",
            fix=f"save it by name: save_pretrained(path, selected_adapters=[{save.adapter!r}]), which writes it to path/{save.adapter}; "
            "get_peft_model_state_dict takes adapter_name, and its default is 'default'",
        )
    if save.settings:
        setting, saved, live = save.settings[0]
        return fail(
            f"{setting} of the adapter {save.adapter!r} is {saved} in {save.path} and {live} in the model that trains: loaded, it computes something else",
            save.slots,
            cause="settings",
            got=", ".join(f"{s} {a}" for s, a, _ in save.settings),
            expected=", ".join(f"{s} {b}" for s, _, b in save.settings),
            fix="set r and lora_alpha in the LoraConfig before the adapter is made; a change of the layers or of the config afterwards reaches only one of the two",
        )
    if save.missing or save.empty:
        return skipped("explained by LP801")
    return ok()


CHECK = Check(
    code="LP802",
    name="saved-wrong-adapter",
    what="The saved file holds the values of another adapter of the model than the one that trains, or its adapter_config.json gives another rank or scale than "
    "the live layers have.",
    why="Every adapter of a model has the same names in a file, which drops the adapter's name, and the scale is not among the tensors: both load without a word.",
    fix="Save by name, and change rank and scale through the configuration only.",
    quiet="Adapters that are equal to each other; rank and alpha patterns; rsLoRA; PiSSA converted to LoRA; checkpoints of a whole module, which name the adapter.",
    threads=("huggingface/peft#1059", "huggingface/peft#699", "huggingface/peft#3639"),
    explained_by=("LP502",),
    needs=("files",),
    judge=judge,
)
