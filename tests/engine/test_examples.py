"""examples=: the examples of every step are scored at every door, and the run is what it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.doors import DOORS, watch_through
from support.recipes import lora, trained
from support.training import Training, batches, next_token_loss
from torch import nn

from lora_probe_callbacks import ExampleProbe, LoraProbeMonitor, per_example_scores
from lora_probe_callbacks.estimators import UpdateDirection
from lora_probe_callbacks.report.page import page
from lora_probe_callbacks.report.runs import read_runs

NAMES = {"negative_fraction", "signal_to_noise", "mean_cosine", "noise_scale"}


def model(**changes: Any) -> nn.Module:
    made = lora(**changes)
    torch.manual_seed(0)
    trained(made)
    return made


def numbers(report: Any) -> dict[str, float]:
    prefix = "lora_probe/examples/"
    return {k.removeprefix(prefix): v for k, v in report.metrics.items() if k.startswith(prefix)}


def by_hand(steps: int, accumulate: int = 1) -> tuple[Any, list[torch.Tensor]]:
    """The scores of the last of some steps of the same training, and its per-example gradients."""
    hand = model()
    optimizer = torch.optim.AdamW([p for p in hand.parameters() if p.requires_grad], lr=1e-3)
    data = list(batches(steps * accumulate))
    before: dict[str, torch.Tensor] = {}
    for step in range(steps):
        mu = UpdateDirection.from_last_step(hand, before) if before else ()
        with per_example_scores(hand, mu, norms=True, self_check="always") as scores:
            for micro in range(accumulate):
                number = step * accumulate + micro
                (next_token_loss(hand, data[number], number) / accumulate).backward()
        before = {n: p.detach().clone() for n, p in hand.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
    return scores, data


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("door", DOORS)
def test_scores_are_those_by_hand(door: str, accumulate: int) -> None:
    examples = ExampleProbe()
    watched = watch_through(door, Training(model(), accumulate=accumulate), steps=3, examples=examples)
    assert not watched.found, watched.found
    assert watched.error is None
    assert watched.report.open_questions == []
    found = numbers(watched.report)
    assert set(found) <= NAMES
    assert {"negative_fraction", "signal_to_noise", "mean_cosine"} <= set(found)
    expected, _ = by_hand(3, accumulate)
    scores = examples.latest
    assert scores is not None
    assert scores.directions == ("last_step",)
    assert scores.checked
    torch.testing.assert_close(scores.s, expected.s, rtol=1e-4, atol=1e-10)
    torch.testing.assert_close(scores.norms, expected.norms, rtol=1e-4, atol=1e-8)
    assert found["negative_fraction"] == float((expected.gain[0] < 0).double().mean())
    assert len(set(scores.ids)) == len(scores.ids) == expected.s.shape[1]


@pytest.mark.parametrize("door", DOORS)
def test_training_is_bit_equal(door: str) -> None:
    def weights(**intent: Any) -> dict[str, torch.Tensor]:
        run = Training(model(), accumulate=2)
        watched = watch_through(door, run, steps=4, **intent)
        assert watched.error is None
        return {name: t.clone() for name, t in run.model.state_dict().items()}

    plain, scored = weights(), weights(examples=ExampleProbe(("last_step", "adam"), gram=True, per_token=True))
    assert all(torch.equal(plain[name], scored[name]) for name in plain)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("door", DOORS)
def test_mixed_precision(door: str, precision: str) -> None:
    watched = watch_through(door, Training(model(), precision=precision), steps=4, examples=ExampleProbe())
    assert not watched.found, watched.found
    assert watched.report.open_questions == []
    assert "negative_fraction" in numbers(watched.report)


def test_noise_scale_of_a_known_gradient() -> None:
    """Against its definition, from all per-example gradients of one batch."""
    hand = model()
    ids = next(iter(batches(1)))
    rows = []
    for n in range(len(ids)):
        hand.zero_grad()
        next_token_loss(hand, ids[n : n + 1], 0).backward()
        rows.append(torch.cat([p.grad.flatten() for p in hand.parameters() if p.grad is not None]).double())
    g = torch.stack(rows)
    hand.zero_grad()
    with per_example_scores(hand, norms=True) as scores:
        next_token_loss(hand, ids, 0).backward()
    B, G = len(g), g.mean(0)
    variance = float((g - G).square().sum()) / (B - 1)  # tr(Sigma), unbiased
    squared = float(G.square().sum()) - variance / B  # |G|^2, unbiased
    expected = variance / squared if squared > 0 else math.nan
    found = ExampleProbe(()).metrics(scores).get("lora_probe/examples/noise_scale", math.nan)
    assert found == pytest.approx(expected, rel=1e-3, nan_ok=True)


def test_record_and_page_list_the_ends(tmp_path: Path) -> None:
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return "words " + " ".join(map(str, ids))

    record = tmp_path / "record.jsonl"
    examples = ExampleProbe(top=2, every_n_steps=2, tokenizer=Tokenizer())
    watched = watch_through("plain", Training(model()), steps=5, examples=examples, record=record)
    assert watched.error is None
    (run,) = read_runs(record)
    assert [line["step"] for line in run.examples] == [2, 4]  # before step 0 there was none
    last = run.examples[-1]
    gains = [entry["gain"] for entry in last["least"]], [entry["gain"] for entry in last["most"]]
    assert gains[0] == sorted(gains[0])
    assert gains[1] == sorted(gains[1], reverse=True)
    assert len(last["least"]) == 2
    assert last["least"][0]["text"].startswith("words ")
    html = page([run])
    assert last["least"][0]["id"] in html
    assert "pulls against it" in html


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    watch_through("plain", Training(model()), steps=3, examples=ExampleProbe(), record=record)
    (run,) = read_runs(record)
    assert run.examples
    assert all("text" not in entry for line in run.examples for entry in (*line["least"], *line["most"]))


def test_what_cannot_be_scored_is_said_and_training_goes_on() -> None:
    run = Training(model(trainable_token_indices=[3]))
    watched = watch_through("plain", run, steps=4, examples=ExampleProbe())
    assert watched.error is None
    assert "no rule for" in watched.report.open_questions[0]
    assert watched.report.status == "unproven"


def test_generation_between_steps_is_not_watched() -> None:
    made = model()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-3)
    examples = ExampleProbe()
    inner = next(m for n, m in made.named_modules() if n.endswith("lora_A.default"))
    with LoraProbeMonitor(made, optimizer, verbose=False, every_n_steps=1000, examples=examples):
        for step, ids in enumerate(batches(8)):
            with torch.no_grad():
                made(input_ids=ids)
            if step > 5:
                assert not inner._forward_hooks
            next_token_loss(made, ids, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert examples.latest is not None
    assert examples.latest.s is not None


def test_directions_of_ones_own_and_of_adam() -> None:
    made = model()
    held_out = next(iter(batches(1)))

    def validation(module: nn.Module) -> UpdateDirection:
        inner = module.model if hasattr(module, "training_step") else module
        return UpdateDirection.from_loss(inner, lambda m: next_token_loss(m, held_out, 0)[None], lr=-1.0)

    examples = ExampleProbe((validation, "adam", "last_step"), norms=False)
    watched = watch_through("plain", Training(made), steps=3, examples=examples)
    assert watched.error is None
    assert examples.latest is not None
    assert examples.latest.directions == ("validation", "adam", "last_step")
    assert set(numbers(watched.report)) == {"negative_fraction", "signal_to_noise"}


def test_what_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match="expected a sequence"):
        ExampleProbe("last_step")
    with pytest.raises(ValueError, match="got 'next_step'"):
        ExampleProbe(("next_step",))
    with pytest.raises(ValueError, match="every_n_steps"):
        ExampleProbe(every_n_steps=0)
    with pytest.raises(ValueError, match="something to compute"):
        ExampleProbe((), norms=False)
    with pytest.raises(ValueError, match="expected an ExampleProbe"):
        watch_through("plain", Training(model()), steps=1, examples=3)
