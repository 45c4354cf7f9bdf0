"""A QLoRA fine-tune that is watched, and a silent fault that is stopped.

Real parts only, on two CPU cores, in about two minutes (one when it runs again):

1. A small base model learns to write like the King James Bible, from nothing.
2. QLoRA teaches it the style of The Devil's Dictionary, under Lightning, watched by `LoraProbe()`.
3. The same run with a bug: a generation merges the adapter and fails, and the exception is
   swallowed. Nothing is reported, the loss goes on, and nothing is learned any more.
4. The same run with the same bug and `LoraProbe(every_n_steps=1)`: it is stopped at that step.
5. The two runs side by side.

Exits with 0 when all of this came true, with 1 when not.

    python examples/quickstart.py
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

import quiet  # noqa: F401  first: one of the lines that it silences is printed by an import

# isort: split
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from rich import box, get_console
from rich.rule import Rule
from rich.table import Table
from small_language_model import (
    Base,
    LanguageModel,
    batches,
    devils_dictionary,
    held_out_loss,
    trained_base,
    trainer,
    windows,
    write_text,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from lora_probe_callbacks import LoraProbe, LoraProbeError

FINE_TUNE_STEPS = 120
FAULTY_STEPS = 24
BATCH_SIZE = 8
LEARNING_RATE = 4e-3
SEED = 1906
PROMPT = "LOVE, n."

# The sampler of sections 3 and 4 writes after this step. Its prompt is longer than `SAMPLE_LENGTH`
# tokens, so `generate` raises a ValueError.
SAMPLE_AFTER = 15
SAMPLE_PROMPT = (
    "HISTORY, n. An account mostly false, of events mostly unimportant, which are brought about "
    "by rulers mostly knaves, and soldiers mostly fools."
)
SAMPLE_LENGTH = 24
FIRST_FAULTY_STEP = 16

console = get_console()  # the one that Lightning's progress bar draws on


def main() -> int:
    """Run the five sections; 0 when everything went as told."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # so small a model gains nothing from a second one, and loses much where cores are shared
    section(1, "A base model, trained from nothing")
    base = trained_base([Progress("base model")])
    told = show_base(base)

    section(2, "QLoRA on another style, watched by LoraProbe()")
    told |= watched_fine_tune(base)

    section(3, "The same run with a bug, and without a probe")
    unwatched = faulty_run(base, probe=None)
    told |= show_unwatched(unwatched)

    section(4, "The same bug, with LoraProbe(every_n_steps=1)")
    watched = faulty_run(base, probe=LoraProbe(every_n_steps=1, verbose=False))
    told |= show_watched(watched)

    section(5, "Side by side")
    told |= compare(unwatched, watched)
    return conclude(told, time.perf_counter() - started)


# ---- 1. the base model -------------------------------------------------------------------------


def show_base(base: Base) -> dict[str, bool]:
    """It is a language model: much better than guessing on chapters that it never saw."""
    table = figures()
    origin = "kept from an earlier run" if base.from_cache else "kept for the next run"
    table.add_row("model", f"Qwen2, {base.parameters / 1e6:.1f} M parameters, {origin}")
    table.add_row("held-out loss", f"{base.held_out_loss:.2f} nats per token (guessing: {base.uniform_loss:.2f})")
    table.add_row("it writes", f"[italic]{base.sample}[/]")
    console.print(table)
    return {"the base model has learned its text": base.held_out_loss < 0.7 * base.uniform_loss}


# ---- 2. the watched fine-tune ------------------------------------------------------------------


def qlora(base: Base) -> torch.nn.Module:
    """The base in four bits, frozen, with a trainable LoRA adapter on all its linear layers."""
    pl.seed_everything(SEED, verbose=False)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base.path, quantization_config=nf4, device_map={"": "cpu"})
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 repacks a layer for inference at its first forward in eval mode, and
            # what it repacked has no backward: measuring the loss before training would break training.
            module.support_avx512bf16_for_cpu = False
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def watched_fine_tune(base: Base) -> dict[str, bool]:
    """Fine-tune the adapter on The Devil's Dictionary; the probe is one more callback."""
    text = devils_dictionary()
    model = qlora(base)
    held_out = windows(text.held_out, base.tokenizer)
    before = held_out_loss(model, held_out)

    probe = LoraProbe()
    trainer([Progress("fine-tune"), probe]).fit(
        LanguageModel(model, LEARNING_RATE), fine_tuning_batches(base, FINE_TUNE_STEPS)
    )

    after = held_out_loss(model, held_out)
    table = figures()
    table.add_row("held-out loss", f"{before:.2f} before, {after:.2f} after {FINE_TUNE_STEPS} steps")
    table.add_row("it writes", f"[italic]{write_text(model, base.tokenizer, PROMPT, tokens=40)}[/]")
    console.print(table)
    failed = [finding for finding in probe.report.findings if finding.status == "fail"]
    return {
        "so has the adapter": after < before - 0.5,
        "the probe finds nothing wrong with the healthy run": not failed,
    }


def fine_tuning_batches(base: Base, steps: int) -> torch.utils.data.DataLoader:
    """Batches of The Devil's Dictionary; every run of this file sees them in the same order."""
    rows = windows(devils_dictionary().training, base.tokenizer)
    return batches(rows, BATCH_SIZE, steps, SEED)


# ---- 3. and 4. the bug -------------------------------------------------------------------------


class Sampler(Callback):
    """Shows now and then what the model writes, as many training scripts do.

    Here is the bug: when `generate` raises, `unmerge_adapter` never runs. From then on the
    forward uses the merged weights and goes past the adapter, and the adapter gets no gradient.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: dict, batch: Tensor, batch_idx: int
    ) -> None:
        """Write one sample in the middle of the run."""
        if batch_idx == SAMPLE_AFTER:
            try:
                sample = self.sample(pl_module.model, SAMPLE_PROMPT)
            except Exception as error:  # a sample must never stop the training
                sample = f"no sample ({type(error).__name__})"
            console.print(f"[dim]after step {batch_idx}:[/] [italic]{sample}[/]", highlight=False)

    def sample(self, model: torch.nn.Module, prompt: str) -> str:
        """Merge for speed (one matrix product per layer instead of three), generate, unmerge."""
        tokens = self.tokenizer(prompt, return_tensors="pt")
        model.merge_adapter()
        written = model.generate(
            **tokens, max_length=SAMPLE_LENGTH, use_cache=False, pad_token_id=self.tokenizer.pad_token_id
        )
        model.unmerge_adapter()
        return " ".join(self.tokenizer.decode(written[0]).split())


class Witness(Callback):
    """Keeps the losses that a user would see, and how far the adapter really moved in each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.moved: list[float] = []
        self.adapter: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the adapter as it starts."""
        self.adapter = adapter_weights(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: dict, batch: Tensor, batch_idx: int
    ) -> None:
        """Note the loss of this step and what the step changed."""
        self.losses.append(outputs["loss"].item())
        self.moved.append(self.change_since_last_step(pl_module))
        self.adapter = adapter_weights(pl_module)

    def change_since_last_step(self, module: torch.nn.Module) -> float:
        """The largest change of any adapter weight since the last completed step."""
        now = adapter_weights(module)
        return max((now[name] - self.adapter[name]).abs().max().item() for name in now)


def adapter_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every LoRA tensor."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if "lora_" in name}


@dataclass(frozen=True)
class FaultyRun:
    """One run with the bug: what was printed, what really happened, and what stopped it, if anything."""

    losses: list[float]
    moved: list[float]
    moved_in_stopped_step: float
    stopped_by: LoraProbeError | None


def faulty_run(base: Base, probe: LoraProbe | None) -> FaultyRun:
    """The fine-tune of section 2 with the buggy sampler, with or without a probe."""
    model = LanguageModel(qlora(base), LEARNING_RATE)
    witness = Witness()
    callbacks = [Progress("fine-tune"), Sampler(base.tokenizer), witness]
    stopped_by = None
    try:
        trainer(callbacks + ([probe] if probe else [])).fit(model, fine_tuning_batches(base, FAULTY_STEPS))
    except LoraProbeError as error:
        stopped_by = error
    return FaultyRun(witness.losses, witness.moved, witness.change_since_last_step(model), stopped_by)


def show_unwatched(run: FaultyRun) -> dict[str, bool]:
    """The run ends well, or so it says."""
    after = run.moved[FIRST_FAULTY_STEP:]
    table = figures()
    table.add_row("the run", f"{len(run.losses)} steps, no error, no warning, last loss {run.losses[-1]:.2f}")
    table.add_row(
        "in truth",
        f"from step {FIRST_FAULTY_STEP} on, no adapter weight moved (largest change: {max(after):g})",
    )
    console.print(table)
    return {
        "without a probe the run goes on, and every loss is finite": len(run.losses) == FAULTY_STEPS
        and all(math.isfinite(loss) for loss in run.losses),
        "and its adapter does not move any more": min(run.moved[:FIRST_FAULTY_STEP]) > 0 and max(after) == 0,
    }


def show_watched(run: FaultyRun) -> dict[str, bool]:
    """The run is stopped in the first step after the failed sample."""
    found = run.stopped_by.findings[0] if run.stopped_by else None
    if run.stopped_by:
        console.print(str(run.stopped_by), markup=False, highlight=False)
    return {
        f"the probe stops it in step {FIRST_FAULTY_STEP} with LP103": found is not None
        and (found.code, found.step) == ("LP103", FIRST_FAULTY_STEP),
        "before the update": len(run.losses) == FIRST_FAULTY_STEP and run.moved_in_stopped_step == 0,
    }


# ---- 5. both -----------------------------------------------------------------------------------


def compare(unwatched: FaultyRun, watched: FaultyRun) -> dict[str, bool]:
    """Step by step: what is printed, what moves, and where the probe steps in."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption="moved: the largest change of any adapter weight")
    for heading in ("step", "loss, no probe", "moved", "loss, LoraProbe", "moved"):
        table.add_column(heading, justify="right")
    for step in range(FIRST_FAULTY_STEP - 3, FIRST_FAULTY_STEP + 4):
        row = [str(step), f"{unwatched.losses[step]:.4f}", change(unwatched.moved[step])]
        if step < len(watched.losses):
            row += [f"{watched.losses[step]:.4f}", change(watched.moved[step])]
        elif step == len(watched.losses):
            row += ["[bold green]stopped: LP103[/]", change(watched.moved_in_stopped_step)]
        table.add_row(*row)
    console.print(table)
    shared = len(watched.losses)
    return {"until then the two runs are equal to the last bit": watched.losses == unwatched.losses[:shared]}


def change(size: float) -> str:
    """A size of a change; exactly zero stands out."""
    return f"{size:.1e}" if size else "[bold red]0[/]"


def conclude(told: dict[str, bool], seconds: float) -> int:
    """Say whether everything came true, and be honest about what did not."""
    for claim, held in told.items():
        console.print(f"[green]yes[/]  {claim}" if held else f"[bold red]NO[/]   {claim}")
    console.print(f"\n{seconds:.0f} s", highlight=False)
    return 0 if all(told.values()) else 1


# ---- the terminal ------------------------------------------------------------------------------


class Progress(RichProgressBar):
    """Lightning's progress bar under a name of our own instead of "Epoch 0/0"."""

    def __init__(self, name: str) -> None:
        super().__init__(leave=True)
        self.name = name

    def _get_train_description(self, current_epoch: int) -> str:
        return self.name

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict:
        """The loss and the probe's word, short enough for one line."""
        metrics = super().get_metrics(trainer, pl_module)
        if "lora_probe/healthy" in metrics:
            metrics["healthy"] = "yes" if metrics.pop("lora_probe/healthy") else "NO"
        return metrics


def section(number: int, title: str) -> None:
    """A titled line."""
    console.print()
    console.print(Rule(f"[bold]{number}. {title}[/]", align="left"))


def figures() -> Table:
    """A table of named figures, without lines."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    return table


if __name__ == "__main__":
    sys.exit(main())
