"""What the examples without Lightning share: a text, a tokenizer, and a base model trained in some seconds.

The base is a Llama of a quarter of a million parameters that has read a little of the King James
Bible, and is to learn the style of The Devil's Dictionary. It is no better than it sounds, and real.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

# At import: an optional inference kernel is missing; this run trains.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# peft 0.21 calls what transformers 5.23 deprecates.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")

import torch  # noqa: E402  after the lines that silence what an import prints
import transformers  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

DATA = Path(__file__).parent / "data"
END_OF_TEXT = "<|endoftext|>"
WINDOW = 48  # tokens per training example
VOCABULARY = 768
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def chapters() -> list[str]:
    """The text of the base model."""
    return (DATA / "king_james.txt").read_text(encoding="utf-8").strip().split("\n\n")[:60]


def entries() -> list[str]:
    """The text of the fine-tune: one entry of The Devil's Dictionary each."""
    return (DATA / "devils_dictionary.txt").read_text(encoding="utf-8").strip().split("\n")


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for both texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(chapters() + entries()[:400], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def windows(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts one after the other, cut into rows: shape [rows, WINDOW]."""
    tokens = tokenizer(END_OF_TEXT.join(texts), return_tensors="pt").input_ids[0]
    rows = len(tokens) // WINDOW
    return tokens[: rows * WINDOW].view(rows, WINDOW)


def train_base(tokenizer: PreTrainedTokenizerFast, steps: int = 120) -> LlamaForCausalLM:
    """A small language model, trained from nothing."""
    torch.set_num_threads(1)  # so small a model gains nothing from a second one
    torch.manual_seed(1611)
    size = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **size, **heads, **ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = windows(chapters(), tokenizer)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def loss_on(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Mean cross-entropy of the next token, in nats."""
    was_training = model.training
    loss = model.eval()(input_ids=rows, labels=rows).loss.item()
    model.train(was_training)
    return loss
