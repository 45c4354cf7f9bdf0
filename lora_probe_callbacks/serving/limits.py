"""What inference engines cannot hold of an adapter, read off its configuration before it is served.

Read off vLLM 0.32 (``vllm/lora/peft_helper.py``, ``vllm/lora/lora_model.py``); what it refuses or leaves out, others do
as well, or worse.
"""

from __future__ import annotations

from typing import Any

from lora_probe_callbacks.serving.live import LiveModel

__all__ = ["limits"]

_USUAL_RANK = 16  # vLLM's max_lora_rank, if nothing is said
# Initialisations that change the base when PEFT makes the adapter.
_OF_THE_BASE = ("pissa", "olora", "corda", "loftq")


def limits(live: LiveModel) -> tuple[str, ...]:
    """What would be refused or left out, in words.

    Args:
        live: The model that was trained.

    Returns:
        One line for each; none for plain LoRA of a usual rank.
    """
    found: list[str] = []
    configs = next((c for m in (live.module,) if isinstance(c := getattr(m, "peft_config", None), dict)), {})
    for adapter in live.active:
        if adapter in configs:
            found += _of_config(configs[adapter])
    tied = {layer.name.rpartition(".")[2] for layer in live.layers if layer.module.__class__.__name__ == "Embedding"}
    if tied:
        found.append(
            f"LoRA of an embedding ({', '.join(sorted(tied))}): vLLM takes it for few models and drops it for others"
        )
    return tuple(found)


def _of_config(config: Any) -> list[str]:
    def has(name: str) -> Any:
        return getattr(config, name, None)

    kind = str(has("peft_type")).rpartition(".")[2]
    if kind != "LORA":
        return [f"an adapter of type {kind}: engines serve LoRA alone; merge it"]
    found = []
    if has("use_dora"):
        found.append("DoRA: vLLM refuses it, others drop its magnitude; merge it")
    if saved := [m for m in has("modules_to_save") or () if m not in ("classifier", "score")]:
        found.append(f"modules_to_save {saved}: vLLM refuses whole modules, others serve the base's; merge them")
    if has("trainable_token_indices"):
        found.append("trainable_token_indices: engines read no rows of an embedding; merge them")
    if has("target_parameters"):
        found.append(
            f"target_parameters {sorted(has('target_parameters'))}: engines that know no fused experts drop them; "
            "verify the endpoint, or merge"
        )
    if has("lora_bias") or has("bias") not in (None, "none"):
        found.append("a bias in the adapter: vLLM refuses it; train with bias='none', or merge")
    if str(has("init_lora_weights")).lower().startswith(_OF_THE_BASE):
        found.append(
            f"init_lora_weights={has('init_lora_weights')!r} changes the base: convert it to plain LoRA when you save"
        )
    refused = ("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora")
    found += [f"{name}: vLLM refuses it" for name in refused if has(name)]
    if has("use_rslora"):
        found.append(
            "rsLoRA: vLLM scales by alpha / sqrt(r), engines that do not know it by alpha / r; verify the endpoint"
        )
    ranks = [has("r") or 0, *(has("rank_pattern") or {}).values()]
    if max(ranks) > _USUAL_RANK:
        found.append(
            f"rank {max(ranks)}: vLLM takes {_USUAL_RANK} by default; start it with --max-lora-rank {max(ranks)}"
        )
    return found
