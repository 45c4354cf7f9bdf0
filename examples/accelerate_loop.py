"""A loop of one's own with Accelerate, watched: the loop does not change by a line.

    python examples/accelerate_loop.py

bfloat16 autocast, gradient accumulation, clipping. `on_failure="stop"` sets the accelerator's trigger
in place of raising, so that all processes leave the loop together. Ends in the health table; the exit
code is 0 for a healthy adapter, 1 for an unhealthy one, 2 if nothing could be judged.
"""

from __future__ import annotations

import sys

from tiny_base import LORA, entries, loss_on, train_base, train_tokenizer, windows  # first: it silences imports

# isort: split
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbeMonitor, preflight


def main() -> int:
    """Train, and say how it went."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    tokenizer = train_tokenizer()
    model = get_peft_model(train_base(tokenizer), LORA)
    rows = windows(entries(), tokenizer)
    held_out, loader = rows[:64], DataLoader(rows[64 : 64 + 16 * 80], batch_size=16, shuffle=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    before = loss_on(model, held_out)
    first = preflight(model, optimizer, {"input_ids": held_out[:4], "labels": held_out[:4]})
    print(f"one look before the run: {'healthy' if first.exit_code == 0 else first}")

    intent = {"every_n_steps": 10, "on_failure": "stop", "verbose": False}
    with LoraProbeMonitor(model, optimizer, accelerator=accelerator, **intent) as probe:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.check_trigger():  # the probe, or any other reason to stop, on any process
                break

    print(f"held-out loss {before:.2f} -> {loss_on(model, held_out):.2f}")
    print(probe.report)
    return probe.report.exit_code


if __name__ == "__main__":
    sys.exit(main())
