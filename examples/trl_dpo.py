"""DPO with TRL, watched: the model with its adapter disabled is its own reference.

    python examples/trl_dpo.py

The preferred ending of an entry of The Devil's Dictionary is its own, the rejected one is from the Bible.
In every step the adapter is switched off for the reference and on again for the policy: what the probe
proves is that it was on in the forward that made the gradient. Ends in the health table; the exit code
is 0 for a healthy adapter, 1 for an unhealthy one, 2 if nothing could be judged.
"""

from __future__ import annotations

import sys
import tempfile

from tiny_base import LORA, chapters, entries, train_base, train_tokenizer  # first: it silences imports

# isort: split
import datasets
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from lora_probe_callbacks import LoraProbeTrainerCallback

STEPS = 40


def preferences(number: int) -> datasets.Dataset:
    """The first words of an entry, how it goes on, and how a verse does."""
    cut = [entry.split(" ") for entry in entries() if len(entry.split(" ")) > 12][:number]
    verses = " ".join(chapters()).split()
    rows = [
        {
            "prompt": " ".join(words[:5]),
            "chosen": " " + " ".join(words[5:12]),
            "rejected": " " + " ".join(verses[50 * i : 50 * i + 7]),
        }
        for i, words in enumerate(cut)
    ]
    return datasets.Dataset.from_list(rows)


def main() -> int:
    """Train, and say how it went."""
    datasets.disable_progress_bars()
    tokenizer = train_tokenizer()
    probe = LoraProbeTrainerCallback(every_n_steps=10, verbose=False, reference="disabled")
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=train_base(tokenizer),
            args=DPOConfig(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=4,
                learning_rate=2e-3,
                beta=0.2,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
            train_dataset=preferences(160),
            processing_class=tokenizer,
            peft_config=LORA,
            callbacks=[probe],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    margins = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    print(f"reward margin {margins[0]:.2f} in the first ten steps, {margins[-1]:.2f} in the last ten")
    print(probe.report)
    return probe.report.exit_code


if __name__ == "__main__":
    sys.exit(main())
