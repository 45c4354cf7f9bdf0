"""How late a fault is found that begins in the middle of a run, by cadence.

    python benchmarks/latency.py

A tiny model is trained; after step 60 its adapter is merged, as a generation that fails would leave it.
Writes ``benchmarks/results/latency.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lora_probe_callbacks import LoraProbeError, LoraProbeMonitor

FAULT_AFTER = 60


def model() -> PeftModel:
    """A Llama of 30 thousand parameters with LoRA, checkpointing's hook on its inputs installed."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, use_cache=False, **sizes))
    base.enable_input_require_grads()
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def found_at(every_n_steps: int) -> tuple[int, str]:
    """The step at which the run is stopped, and the code."""
    policy = model()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(1, 64, (2, 12))
    try:
        with LoraProbeMonitor(policy, optimizer, every_n_steps=every_n_steps, verbose=False):
            for step in range(3 * FAULT_AFTER):
                if step == FAULT_AFTER + 1:
                    policy.merge_adapter()
                policy(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    except LoraProbeError as error:
        return error.findings[0].step, error.findings[0].code
    raise SystemExit(f"not found with every_n_steps={every_n_steps}")


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    rows = []
    for cadence in (1, 10, 50, 100):
        step, code = found_at(cadence)
        rows.append({"every_n_steps": cadence, "code": code, "found_at": step, "steps_late": step - FAULT_AFTER - 1})
        print(
            f"every_n_steps={cadence:<4} {code} at step {step}, {rows[-1]['steps_late']} steps after the first bad one"
        )
    path = Path(__file__).parent / "results" / "latency.json"
    path.write_text(json.dumps({"first_bad_step": FAULT_AFTER + 1, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
