"""The parts of the quickstart that are not about the probe: two texts, a tokenizer, a small base model.

The base is a Qwen2 of one million parameters, trained for less than a minute on the narrative
books of the King James Bible. It is kept in `examples/.cache/` for the next run.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
END_OF_TEXT = "<|endoftext|>"
WINDOW = 128  # tokens per training example
HELD_OUT_EVERY = 16  # one chapter, or one entry, of sixteen is never trained on

# Every width is a multiple of 64: nf4 quantizes blocks of 64 numbers.
ARCHITECTURE = {
    "vocab_size": 1536,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
BASE_TRAINING = {"steps": 400, "batch_size": 8, "learning_rate": 4e-3, "seed": 1611}


@dataclass(frozen=True)
class Text:
    """A text, cut into units that are kept whole: chapters or dictionary entries."""

    training: list[str]
    held_out: list[str]

    @classmethod
    def read(cls, name: str, separator: str) -> Text:
        """Read `examples/data/<name>` and set every sixteenth unit aside."""
        units = (HERE / "data" / name).read_text(encoding="utf-8").strip().split(separator)
        return cls(
            training=[unit for i, unit in enumerate(units) if i % HELD_OUT_EVERY],
            held_out=units[::HELD_OUT_EVERY],
        )


def king_james() -> Text:
    """The text of the base model, a chapter per unit."""
    return Text.read("king_james.txt", separator="\n\n")


def devils_dictionary() -> Text:
    """The text of the fine-tune, an entry per unit."""
    return Text.read("devils_dictionary.txt", separator="\n")


def train_tokenizer(texts: list[Text]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the training part of the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        (unit for text in texts for unit in text.training),
        trainers.BpeTrainer(
            vocab_size=ARCHITECTURE["vocab_size"],
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def windows(units: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All units one after the other, cut into rows of `WINDOW` tokens: shape [rows, WINDOW]."""
    tokens = tokenizer("".join(END_OF_TEXT + unit for unit in units), return_tensors="pt").input_ids[0]
    rows = len(tokens) // WINDOW
    return tokens[: rows * WINDOW].view(rows, WINDOW)


def batches(rows: Tensor, batch_size: int, steps: int, seed: int) -> DataLoader:
    """One epoch of that many steps, going over the rows as often as needed; the same for the same seed."""
    order = RandomSampler(rows, num_samples=steps * batch_size, generator=torch.Generator().manual_seed(seed))
    return DataLoader(rows, batch_size=batch_size, sampler=order)


class LanguageModel(pl.LightningModule):
    """Next-token training of any causal language model, with or without an adapter."""

    def __init__(self, model: torch.nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model = model.train()
        self.learning_rate = learning_rate

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The mean cross-entropy of the next token, in nats."""
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        """AdamW on what is trainable, with a short warm-up and a decay to zero."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, self.trainer.estimated_stepping_batches, pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(callbacks: list[Callback]) -> pl.Trainer:
    """A Lightning trainer for one epoch on the CPU that writes no files."""
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: Tensor) -> float:
    """Mean cross-entropy per token on text that was not trained on, in nats."""
    was_training = model.training
    model.eval()
    losses = [model(input_ids=batch, labels=batch, use_cache=False).loss.item() for batch in rows.split(16)]
    model.train(was_training)
    return sum(losses) / len(losses)


def write_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int) -> str:
    """A sample from the model that continues the prompt, always the same one."""
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        written = model.generate(
            **tokenizer(prompt, return_tensors="pt"),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=0.5,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    return " ".join(tokenizer.decode(written[0], skip_special_tokens=True).split())


@dataclass(frozen=True)
class Base:
    """The trained base model on disk."""

    path: Path
    tokenizer: PreTrainedTokenizerFast
    parameters: int
    held_out_loss: float
    sample: str
    from_cache: bool

    @property
    def uniform_loss(self) -> float:
        """What a model that knows nothing would reach."""
        return math.log(ARCHITECTURE["vocab_size"])


def cache_key() -> str:
    """Changes with the texts and with this file: architecture, training and all."""
    digest = hashlib.sha256()
    for file in [Path(__file__), *sorted((HERE / "data").glob("*.txt"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def trained_base(callbacks: list[Callback]) -> Base:
    """Train the base model, or take the one of an earlier run from `examples/.cache/`."""
    path = HERE / ".cache" / f"base-{cache_key()}"
    from_cache = path.exists()
    if not from_cache:
        unfinished = path.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        train_base(unfinished, callbacks)
        unfinished.rename(path)
    facts = json.loads((path / "facts.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    return Base(path, tokenizer, from_cache=from_cache, **facts)


def train_base(path: Path, callbacks: list[Callback]) -> None:
    """Train tokenizer and base model on the King James Bible and save both."""
    pl.seed_everything(BASE_TRAINING["seed"], verbose=False)
    text = king_james()
    tokenizer = train_tokenizer([text, devils_dictionary()])
    model = Qwen2ForCausalLM(Qwen2Config(**ARCHITECTURE, eos_token_id=tokenizer.eos_token_id))
    loader = batches(
        windows(text.training, tokenizer),
        BASE_TRAINING["batch_size"],
        BASE_TRAINING["steps"],
        BASE_TRAINING["seed"],
    )
    trainer(callbacks).fit(LanguageModel(model, BASE_TRAINING["learning_rate"]), loader)
    facts = {
        "parameters": model.num_parameters(),
        "held_out_loss": held_out_loss(model, windows(text.held_out, tokenizer)),
        "sample": write_text(model, tokenizer, "And the king said unto", tokens=48),
    }
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "facts.json").write_text(json.dumps(facts))
