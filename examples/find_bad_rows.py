"""Which rows of the training set pull against the validation set? Mislabelled ones say so while training runs.

    python examples/find_bad_rows.py [--plot runs/find_bad_rows.png]

A small language model reads a line of the King James Bible or of The Devil's Dictionary and says which. Of 240 training
rows every tenth has the wrong label. While LoRA trains, every row of every batch is scored along the gradient of a
clean validation set: `gain`, how much a step on the row alone would lower the validation loss. Summed over the run,
the rows with the lowest gain are looked at first. Their loss, which one would otherwise sort by, is shown beside it.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tiny_base import LORA, chapters, entries, train_base, train_tokenizer  # first: it silences imports

# isort: split
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lora_probe_callbacks import per_example_scores
from lora_probe_callbacks.estimators import UpdateDirection

LENGTH, ROWS, VALIDATION, BATCH, EPOCHS, SHOWN = 24, 240, 64, 16, 4, 20
LEARNING_RATE = 2e-3


def labelled(tokenizer: object) -> tuple[Tensor, Tensor]:
    """Return rows of tokens [N, LENGTH], and 0 for scripture or 1 for the dictionary."""
    lines = [line for chapter in chapters() for line in chapter.split("\n")]
    texts = [(line, 0) for line in lines] + [(entry.partition(". ")[2], 1) for entry in entries()]
    found = [(tokenizer(text).input_ids[:LENGTH], label) for text, label in texts]  # type: ignore[operator]
    whole = [(ids, label) for ids, label in found if len(ids) == LENGTH]
    sides = [[row for row in whole if row[1] == side] for side in (0, 1)]
    count = (ROWS + VALIDATION) // 2
    rows = [row for side in sides for row in random.sample(side, count)]
    random.shuffle(rows)
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([label for _, label in rows])


def losses(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each row, [B]: two words of the vocabulary stand for the two labels."""
    logits = model(input_ids=ids).logits[:, -1, 1:3]
    return F.cross_entropy(logits, labels, reduction="none")


def train(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Train once.

    Returns:
        Summed gain, last loss, and whether the label is wrong, of every training row.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    base = train_base(tokenizer)
    ids, labels = labelled(tokenizer)
    torch.manual_seed(seed)
    model = get_peft_model(base, LORA)
    held_out = ids[ROWS:], labels[ROWS:]
    wrong = torch.zeros(ROWS, dtype=torch.bool)
    wrong[::10] = True
    given = torch.where(wrong, 1 - labels[:ROWS], labels[:ROWS])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    gain, last = torch.zeros(ROWS), torch.zeros(ROWS)
    for _ in range(EPOCHS):
        for batch in torch.randperm(ROWS).split(BATCH):
            # A step of size 1 down the gradient of the validation loss.
            validation = UpdateDirection.from_loss(model, lambda m: losses(m, *held_out), lr=-1.0)
            with per_example_scores(model, validation) as scores:
                L = losses(model, ids[batch], given[batch])
                L.mean().backward()
            gain[batch] += scores.gain[0]
            last[batch] = L.detach()
            optimizer.step()
            optimizer.zero_grad()
    return gain, last, wrong


def precision(order: Tensor, wrong: Tensor) -> float:
    """Return the part of the first rows that is mislabelled."""
    return float(wrong[order[:SHOWN]].double().mean())


def main() -> None:
    """Train, and count how many of the rows at the top are mislabelled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    gain, last, wrong = train(options.seed)
    by_gain, by_loss = gain.argsort(), last.argsort(descending=True)
    print(f"{int(wrong.sum())} of {ROWS} rows are mislabelled: chance finds {float(wrong.double().mean()):.2f}")
    print(f"precision at {SHOWN}: {precision(by_gain, wrong):.2f} by gain on the validation loss,", end=" ")
    print(f"{precision(by_loss, wrong):.2f} by the row's own loss")
    if options.plot is not None:
        draw(options.plot, by_gain, gain, wrong)


def draw(path: Path, order: Tensor, gain: Tensor, wrong: Tensor) -> None:
    """Draw the rows in the order of their gain, mislabelled ones marked."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    places = torch.arange(len(order))
    bad = wrong[order]
    axes.bar(places[~bad], gain[order][~bad], width=1, color="#9aa7b5", label="right label")
    axes.bar(places[bad], gain[order][bad], width=1, color="#c2410c", label="wrong label")
    axes.axvline(SHOWN - 0.5, color="black", linewidth=0.8, linestyle=":")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="training rows, by gain", ylabel="gain on the validation loss", xlim=(-1, len(order)))
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
