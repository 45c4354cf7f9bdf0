"""Supervised fine-tuning with the Transformers Trainer, watched: one more callback.

    python examples/trainer_sft.py

A small base model is trained first, then LoRA teaches it another style. Ends in the health table;
the exit code is 0 for a healthy adapter, 1 for an unhealthy one, 2 if nothing could be judged.
"""

from __future__ import annotations

import sys
import tempfile

from tiny_base import LORA, entries, loss_on, train_base, train_tokenizer, windows  # first: it silences imports

# isort: split
from peft import get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments

from lora_probe_callbacks import LoraProbeTrainerCallback


def main() -> int:
    """Train, and say how it went."""
    tokenizer = train_tokenizer()
    model = get_peft_model(train_base(tokenizer), LORA)
    rows = windows(entries(), tokenizer)
    training, held_out = rows[64:], rows[:64]

    before = loss_on(model, held_out)
    probe = LoraProbeTrainerCallback(every_n_steps=20, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=80,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                learning_rate=4e-3,
                lr_scheduler_type="cosine",
                warmup_steps=5,
                logging_steps=20,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in training],
            callbacks=[probe],
        )
        probe.attach(trainer)  # optional: tells why, should the loop itself raise
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    print(f"held-out loss {before:.2f} -> {loss_on(model, held_out):.2f}")
    last = [row for row in trainer.state.log_history if "lora_probe/healthy" in row][-1]
    moved = last["lora_probe/update/relative_norm"]
    print(f"step {last['step']} of the log: loss and, among others, a relative update of {moved:.1e}")
    print(probe.report)
    return probe.report.exit_code


if __name__ == "__main__":
    sys.exit(main())
