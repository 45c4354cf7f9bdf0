"""The policy that samples is the policy that trains; if not, it says which one it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.serving import ALL
from support.tiny import VOCABULARY, Task, fit, peft_llama, token_batches
from support.training import hooks_of_the_probe
from torch import nn

from lora_probe_callbacks import LoraProbe, LoraProbeMonitor, ProbeReport
from lora_probe_callbacks.serving.scoring import score

STEPS = 7


def sampled(policy: nn.Module, *, temperature: float = 1.0, top_p: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sixteen sequences of 4 given and 16 sampled tokens, and the sampler's log-probs of the latter."""
    ids, log_probs = torch.randint(1, VOCABULARY, (16, 4)), torch.zeros(16, 0)
    with torch.no_grad():
        for _ in range(16):
            p = (policy(input_ids=ids).logits[:, -1] / temperature).softmax(-1)
            if top_p < 1:
                ordered, places = p.sort(descending=True)
                ordered = ordered * ((ordered.cumsum(-1) - ordered) < top_p)
                p = torch.zeros_like(p).scatter(-1, places, ordered / ordered.sum(-1, keepdim=True))
            token = torch.multinomial(p, 1)
            ids, log_probs = torch.cat([ids, token], 1), torch.cat([log_probs, p.gather(-1, token).log()], 1)
    return ids, log_probs


class Run:
    """A policy-gradient loop: small tokens are rewarded. The sampler is a model of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = peft_llama(target_modules=ALL)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=2e-2)
        self.former: list[nn.Module] = []

    def sampler(self, late: int = 0) -> nn.Module:
        self.former.append(copy.deepcopy(self.model).eval())
        return self.former[max(0, len(self.former) - 1 - late)]

    def update(self, ids: torch.Tensor) -> None:
        log_probs = self.model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        reward = (ids[:, 1:] < 8).float()
        (-(log_probs * (reward - reward.mean())).mean() * 5).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def trained_on(
    late: int = 0,
    *,
    ignored: bool = False,
    noise: float = 0.0,
    shifted: bool = False,
    said: dict[str, float] | None = None,
    **sampling: float,
) -> tuple[ProbeReport, Run]:
    run = Run()
    with LoraProbeMonitor(run.model, run.optimizer, every_n_steps=1, verbose=False, on_failure="stop") as probe:
        for _ in range(STEPS):
            sampler = run.sampler(late)
            ids, log_probs = sampled(copy.deepcopy(sampler).unload() if ignored else sampler, **sampling)
            log_probs = (log_probs + noise * torch.randn_like(log_probs)).roll(int(shifted), 1)
            probe.watch_rollout(ids, log_probs, **(said or {}))
            run.update(ids)
    return probe.report, run


def found(report: ProbeReport) -> list[tuple[str, str, str]]:
    return [(f.code, f.status, f.cause) for f in report.with_status("fail", "warn")]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"noise": 0.003},
        {"temperature": 0.7, "said": {"temperature": 0.7}},
        {"top_p": 0.8, "said": {"top_p": 0.8}},
        {"said": {"temperature": 0.7}},  # log-probs before the temperature is applied
    ],
)
def test_sampler_that_is_the_policy_is_proven(more: dict[str, Any]) -> None:
    report, run = trained_on(**more)
    assert not found(report), str(report)
    assert report.status == "healthy"
    proof = report.proofs["served"]
    assert proof.complete
    assert proof.step == STEPS - 1
    assert not list(hooks_of_the_probe(run.model))


def test_sampler_that_was_never_sent_the_adapter() -> None:
    report, _ = trained_on(late=STEPS)
    assert ("LP817", "fail", "ignored") in found(report), str(report)
    assert report.proofs["served"].proven == 0
    assert "LP817" in report.proofs["served"].why


def test_sampler_that_ignores_the_adapter() -> None:
    report, _ = trained_on(ignored=True)
    assert ("LP817", "fail", "ignored") in found(report), str(report)
    (finding,) = report.failures
    assert finding.step == 2, "the base was the policy of step 0, and one update is how asynchronous sampling is meant"


def test_sampler_that_is_late_says_by_how_much() -> None:
    report, _ = trained_on(late=2)
    late = [f for f in report.failures if f.cause == "late"]
    assert late, str(report)
    assert "2 updates behind" in late[0].message


def test_one_update_late_is_a_warning() -> None:
    report, _ = trained_on(late=1)
    assert found(report) == [("LP817", "warn", "late")], str(report)


def test_other_temperature() -> None:
    report, _ = trained_on(temperature=0.7)
    assert {(code, status) for code, status, _ in found(report)} == {("LP818", "warn")}, str(report)
    assert (
        "temperature 0.69" in report.with_status("warn")[0].message
        or "temperature 0.7" in report.with_status("warn")[0].message
    )


def test_other_top_p() -> None:
    report, _ = trained_on(top_p=0.8)
    assert {(code, status) for code, status, _ in found(report)} == {("LP818", "warn")}, str(report)
    assert "top-p 0.8" in report.with_status("warn")[0].message


def test_other_tokens() -> None:
    report, _ = trained_on(shifted=True)
    assert ("LP819", "fail", "") in found(report), str(report)
    assert not [code for code, _, _ in found(report) if code == "LP817"]


def test_training_is_bit_equal_with_and_without_a_look() -> None:
    _, watched = trained_on()
    run = Run()
    for _ in range(STEPS):
        ids, _ = sampled(run.sampler())
        torch.randn(16, 16)  # the noise that is added in the other run
        run.update(ids)
    assert all(torch.equal(a, b) for a, b in zip(watched.model.parameters(), run.model.parameters(), strict=True))


def test_rollout_that_cannot_be_compared_is_not_judged() -> None:
    run = Run()
    with LoraProbeMonitor(run.model, run.optimizer, every_n_steps=1, verbose=False) as probe:
        ids, log_probs = sampled(run.sampler())
        probe.watch_rollout(ids, log_probs[:3])
        run.update(ids)
        probe.watch_rollout(ids, log_probs[:, :1])
        run.update(ids)
    (finding,) = [f for f in probe.report.findings if f.code == "LP817"]
    assert finding.status == "skipped"
    assert not probe.report.internal_errors
    assert "served" not in probe.report.proofs


def test_lightning_door() -> None:
    probe = LoraProbe(every_n_steps=1, verbose=False)
    model = peft_llama(target_modules=ALL)

    def step(task: Task, batch: torch.Tensor, index: int) -> torch.Tensor:
        scored = [torch.tensor(row) for row in score(copy.deepcopy(model).eval(), batch.tolist())]
        probe.watch_rollout(batch, scored)
        loss: torch.Tensor = model(input_ids=batch, labels=batch).loss
        return loss

    fit(Task(model, step), probe, token_batches(8))
    assert not found(probe.report), str(probe.report)
