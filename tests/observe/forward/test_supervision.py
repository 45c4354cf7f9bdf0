"""Which tokens the loss is made of, whatever the loss: real models, real losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from peft import LoraConfig, get_peft_model
from support.tiny import VOCABULARY, llama, lora, peft_llama
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from lora_probe_callbacks import LoraProbeMonitor, ProbeReport

STOP = 2  # the default of LlamaConfig
Loss = Callable[[nn.Module, int], Tensor]


def tokens(number: int, rows: int = 2, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def run(loss: Loss, steps: int = 6, model: nn.Module | None = None, passes: int = 1, **intent: Any) -> ProbeReport:
    model = peft_llama() if model is None else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    settings = {"every_n_steps": 1, "on_failure": "stop", "verbose": False} | intent
    with LoraProbeMonitor(model, optimizer, **settings) as probe:
        for step in range(steps):
            for part in range(passes):
                loss(model, step * passes + part).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not probe.report.internal_errors
    return probe.report


def found(report: ProbeReport) -> list[tuple[str, str, int]]:
    return [(f.code, f.status, f.step) for f in report.with_status("warn", "fail")]


def with_labels(change: Callable[[Tensor], Tensor]) -> Loss:
    def loss(model: nn.Module, number: int) -> Tensor:
        ids = tokens(number)
        return model(input_ids=ids, labels=change(ids)).loss

    return loss


def answers(ids: Tensor) -> Tensor:
    return torch.where(torch.arange(ids.shape[1]) < 6, -100, ids)


def outside(model: nn.Module, number: int) -> Tensor:
    ids = tokens(number)
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), answers(ids)[:, 1:].reshape(-1))


def preference(model: nn.Module, number: int) -> Tensor:
    """DPO's loss on the second half of two rows, without its reference."""
    ids = tokens(number)
    logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    each = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, 5:].sum(-1)
    return -F.logsigmoid(each[0] - each[1])


def few_logits(model: nn.Module, number: int) -> Tensor:
    """Logits of the last positions alone, as GRPO asks for them."""
    ids = tokens(number)
    logits = model(input_ids=ids, logits_to_keep=7).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 6:].reshape(-1))


@pytest.mark.parametrize("loss", [with_labels(answers), outside, preference, few_logits])
@pytest.mark.parametrize("passes", [1, 3])
def test_supervised_tokens_are_seen_whatever_the_loss(loss: Loss, passes: int) -> None:
    report = run(loss, passes=passes)
    assert found(report) == []
    assert report.status == "healthy"
    assert report.metrics["lora_probe/supervision/token_fraction"] == 0.5
    assert report.metrics["lora_probe/supervision/empty_row_fraction"] == 0.0
    assert report.supervision is not None
    assert (report.supervision.totals.rows, report.supervision.totals.supervised) == (12 * passes, 72 * passes)
    assert report.proofs["supervised"].complete


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_hides_nothing(reentrant: bool) -> None:
    model = peft_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    report = run(with_labels(answers), model=model)
    assert found(report) == []
    assert report.metrics["lora_probe/supervision/token_fraction"] == 0.5


def test_the_first_rows_are_shown() -> None:
    report = run(with_labels(answers))
    assert report.supervision is not None
    first = report.supervision.rows[0]
    assert first.tokens == tuple(tokens(0)[0].tolist())
    assert first.supervised == (False,) * 6 + (True,) * 6
    ids = [str(token) for token in first.tokens]
    assert report.supervision.text(first) == " ".join([*ids[:6], "\u27e6" + " ".join(ids[6:]) + "\u27e7"])
    assert str(report.supervision).startswith("72 of 144 tokens supervised (50%), 0 of 12 rows without any")


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "status"), [((0,), "warn"), ((3,), "warn"), ((2, 3, 4, 5), "fail"), (tuple(range(6)), "fail")]
)
def test_batches_without_a_label_are_told_at_once(hidden: tuple[int, ...], status: str) -> None:
    def loss(model: nn.Module, number: int) -> Tensor:
        ids = tokens(number)
        labels = torch.full_like(ids, -100) if number in hidden else ids
        return model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(22)).loss

    assert found(run(loss)) == [("LP001", status, hidden[0])]


def test_labels_that_are_shifted_twice() -> None:
    def shifted(ids: Tensor) -> Tensor:
        return torch.cat([ids[:, 1:], ids.new_full((2, 1), -100)], 1)

    assert found(run(with_labels(shifted))) == [("LP005", "fail", 0)]
    passed_on = run(lambda model, n: model(input_ids=tokens(n), labels=tokens(n), shift_labels=shifted(tokens(n))).loss)
    assert found(passed_on) == []


def padded(number: int) -> dict[str, Tensor]:
    ids = tokens(number)
    attention = torch.ones_like(ids)
    attention[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": attention}


@pytest.mark.parametrize("masked", [True, False])
def test_padding_that_is_supervised(masked: bool) -> None:
    def loss(model: nn.Module, number: int) -> Tensor:
        batch = padded(number)
        ids = batch["input_ids"]
        return model(**batch, labels=torch.where(batch["attention_mask"] == 0, -100, ids) if masked else ids).loss

    assert found(run(loss)) == ([] if masked else [("LP002", "warn", 0)])


class WithMask(nn.Module):
    """A model that is handed the completion mask, and leaves it to its labels to heed it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = peft_llama()

    def forward(self, completion_mask: Tensor, **batch: Tensor) -> Tensor:
        return self.inner(**batch).loss


@pytest.mark.parametrize("applied", [True, False])
def test_prompt_that_is_supervised_although_there_is_a_mask(applied: bool) -> None:
    def loss(model: nn.Module, number: int) -> Tensor:
        ids = tokens(number)
        mask = (torch.arange(12) >= 6).expand(2, 12).long()
        return model(completion_mask=mask, input_ids=ids, labels=answers(ids) if applied else ids)

    assert found(run(loss, model=WithMask())) == ([] if applied else [("LP003", "fail", 0)])


@pytest.mark.parametrize("masked", [True, False])
def test_stop_tokens_that_are_left_out(masked: bool) -> None:
    def loss(model: nn.Module, number: int) -> Tensor:
        ids = tokens(number)
        ids[:, 10] = STOP
        labels = answers(ids)
        labels[:, 11] = -100
        if masked:
            labels[ids == STOP] = -100
        return model(input_ids=ids, labels=labels).loss

    report = run(loss)
    assert found(report) == ([("LP004", "warn", 3)] if masked else [])
    assert report.metrics["lora_probe/supervision/stop_token_fraction"] == (0.0 if masked else pytest.approx(0.2))


# --- what has no positions ------------------------------------------------------------------------


def test_encoder_decoder_and_classifier_are_proven_by_their_rows() -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    )
    model = get_peft_model(t5, lora(target_modules=["q", "v"]))
    report = run(lambda m, n: m(input_ids=tokens(n), labels=tokens(n + 50, length=5)).loss, model=model)
    assert found(report) == []
    assert report.proofs["supervised"].complete
    bert = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    )
    classifier = get_peft_model(bert, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))
    report = run(lambda m, n: m(input_ids=tokens(n), labels=torch.tensor([0, 1])).loss, model=classifier)
    assert found(report) == []
    assert report.proofs["supervised"].complete


def test_a_model_that_is_none_of_transformers_has_no_such_claim() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["0", "2"]))
    report = run(
        lambda m, n: m(torch.randn(4, 8, generator=torch.Generator().manual_seed(n))).square().mean(), model=model
    )
    assert report.status == "healthy"
    assert "supervised" not in report.proofs
    assert report.supervision is None


def test_nothing_is_hooked_if_no_such_check_was_asked_for() -> None:
    report = run(with_labels(answers), ignore=["LP0"])
    assert report.supervision is None
    assert "supervised" not in report.proofs
    assert not any("supervision" in name for name in report.metrics)


@pytest.mark.parametrize("rewards", [(0.0,) * 2, (1.0, -1.0)])
def test_advantages_of_zero_are_no_fault(rewards: tuple[float, float]) -> None:
    def loss(model: nn.Module, number: int) -> Tensor:
        ids = tokens(number)
        logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        each = logits.gather(-1, ids[:, 1:, None]).squeeze(-1).mean(-1)
        return -(each * torch.tensor(rewards if number % 2 else (1.0, -1.0))).mean()

    assert found(run(loss)) == []


def test_two_models_below_one_root_are_not_mixed_up() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy, self.value = peft_llama(), llama()

        def forward(self, ids: Tensor) -> Tensor:
            return self.policy(input_ids=ids, labels=ids).loss

    report = run(lambda m, n: m(tokens(n)), model=Both(), select=["LP0", "LP1"])
    assert report.supervision is None
