"""Health is proven, never assumed: for each claim, of which tensors, since when, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.doors import watch_through
from support.facts import GRADIENT, MOVED, NONE, STILL, ZERO, facts
from support.training import Training, adamw, adapter_tensors, batches, llama, lora, next_token_loss, trainable, watch
from torch import Tensor, nn
from torch.optim import AdamW

from lora_probe_callbacks import LoraProbeError, LoraProbeMonitor, ProbeReport, preflight
from lora_probe_callbacks.checks._catalogue import all_checks
from lora_probe_callbacks.engine.proofs import PATIENCE, ProofBook, claims_of
from lora_probe_callbacks.estimators import VarianceProbe
from lora_probe_callbacks.report.runs import read_runs

CLAIMS = ["supervised", "active", "reached", "owned", "moved", "seen"]
DOORS = ["lightning", "plain", "trainer"]


def plain(model: nn.Module, steps: int = 8, **intent: Any) -> Iterator[int]:
    """A plain loop of a healthy run; its caller does something between forward and step, or to the report."""
    optimizer = adamw(model)
    with LoraProbeMonitor(model, optimizer, verbose=False, every_n_steps=1, **intent) as probe:
        for number, batch in enumerate(batches(steps)):
            next_token_loss(model, batch, number).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield number, probe  # type: ignore[misc]


def fractions(report: ProbeReport) -> dict[str, tuple[int, int]]:
    """Of the claims that are looked at as a whole; the gradient is measured a part at a time."""
    return {c: (proof.proven, proof.expected) for c, proof in report.proofs.items() if not proof.sampled}


# --- a healthy run --------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
def test_healthy_run_is_proven_tensor_by_tensor(door: str) -> None:
    report = watch_through(door, Training(lora(hook=True)), every_n_steps=1).report
    assert report.status == "healthy", str(report)
    assert (report.healthy, report.exit_code) == (True, 0)
    assert fractions(report) == dict.fromkeys(CLAIMS, (8, 8))
    assert [report.proofs[c].step for c in CLAIMS] == [7] * 6  # type: ignore[index]
    assert {report.metrics[f"lora_probe/proven/{claim}"] for claim in CLAIMS} == {1.0}
    assert not any(proof.missing or proof.why for proof in report.proofs.values() if not proof.sampled)
    gradient = report.proofs["gradient"]
    assert (gradient.expected, gradient.sampled, gradient.complete) == (8, True, False), "and the run is healthy"
    assert gradient.proven >= 5
    assert f"gradient {gradient.proven}/8" in " ".join(str(report).split())
    assert str(report).startswith("LoRA probe: healthy. 8 of 8 adapter tensors proven")


def test_first_steps_are_unproven_and_say_what_is_to_come() -> None:
    statuses = []
    for number, probe in plain(lora()):  # type: ignore[misc]
        report = probe.report
        statuses.append(report.status)
        if number == 0:
            assert fractions(report) == {
                "supervised": (8, 8),
                "active": (8, 8),
                "reached": (4, 8),
                "owned": (8, 8),
                "moved": (0, 8),
                "seen": (0, 8),
            }
            assert report.proofs["reached"].why == "4 with a gradient of exactly zero so far (not yet)"
            assert all("lora_A" in name for name in report.proofs["reached"].missing)
    assert statuses[:2] == ["unproven", "unproven"]
    assert set(statuses[3:]) == {"healthy"}


def test_default_cadence_looks_until_everything_is_proven() -> None:
    """A rate that begins at zero for three steps: the four steps that are always probed prove next to nothing."""
    model = lora()
    run = Training(model, scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: float(step >= 3)))
    report = watch_through("plain", run, steps=12).report
    assert report.status == "healthy", str(report)
    assert report.judged_steps < 12, "and no longer"


def test_claims_follow_the_selection() -> None:
    assert claims_of([c for c in all_checks() if c.family == "activation"]) == {"active"}
    report = watch(Training(lora(hook=True)), select=("LP1",), every_n_steps=1).report
    assert list(report.proofs) == ["active"]
    assert report.status == "healthy"


def test_run_in_which_nothing_is_meant_to_train_says_so() -> None:
    report = watch(Training(lora(hook=True)), frozen=("layers.",), on_failure="warn", ignore=("LP404",)).report
    assert report.status == "unproven", str(report)
    assert {(p.expected, p.why) for p in report.proofs.values() if not p.sampled} == {
        (0, "no tensor is meant to train")
    }


def test_selection_that_proves_nothing_is_not_called_healthy() -> None:
    report = watch(Training(lora(hook=True)), select=("LP5",), every_n_steps=1).report
    assert report.with_status("pass")
    assert not report.failures
    assert (report.proofs, report.status, report.exit_code) == ({}, "unproven", 2)
    assert report.why_unproven() == ["the checks that were selected prove nothing about training (select, ignore)"]


# --- nothing was looked at (P1, P3, P6, P7) --------------------------------------------------------


def folk_fix(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    """It silences "element 0 of tensors does not require grad", and trains nothing."""
    with torch.no_grad():
        loss = next_token_loss(model, batch, step)
    return loss.requires_grad_(True)


@pytest.mark.parametrize("door", DOORS)
def test_every_forward_without_gradients_is_never_healthy(door: str) -> None:
    watched = watch_through(door, Training(lora(), loss=folk_fix), steps=3, every_n_steps=1)
    assert watched.report.status == "unproven"
    assert (watched.report.healthy, watched.report.exit_code) == (None, 2)
    assert "without gradients" in watched.report.proofs["reached"].why
    assert not {"LP301", "LP302", "LP303", "LP401", "LP501"} & {f.code for f in watched.report.with_status("pass")}
    watched = watch_through(door, Training(lora(), loss=folk_fix), steps=12, every_n_steps=1)
    assert isinstance(watched.error, LoraProbeError)
    (finding,) = watched.report.failures
    assert (finding.code, finding.step) == ("LP302", 3)
    assert "requires_grad_(True)" in finding.fix
    assert watched.report.exit_code == 1


def test_preflight_of_a_forward_without_gradients_is_unproven() -> None:
    model = lora()
    report = preflight(model, adamw(model), batches(1)[0], loss_fn=lambda m, b: folk_fix(m, b, 0))
    assert report.exit_code == 2
    assert "without gradients" in str(report)


@pytest.mark.parametrize("door", ["plain", "trainer"])
def test_run_without_a_step_is_decided_by_its_backward_passes(door: str) -> None:
    """An accumulation that is longer than the data."""
    watched = watch_through(door, Training(lora(), accumulate=64), steps=1, every_n_steps=1, on_failure="warn")
    assert watched.report.status in ("healthy", "unproven"), "it steps in the end"
    model = lora()
    optimizer = adamw(model)
    with LoraProbeMonitor(model, optimizer, verbose=False, on_failure="stop") as probe:
        for number, batch in enumerate(batches(20)):
            next_token_loss(model, batch, number).backward()
            if number == 17:
                (finding,) = probe.report.with_status("fail", "warn")
                assert (finding.code, finding.cause, finding.status) == ("LP401", "no step", "warn")
                assert "16 backward passes" in finding.message
    assert probe.report.status == "unhealthy"
    assert probe.report.proofs["moved"].proven == 0


def test_gradients_cleared_and_never_applied_fail_after_sixteen_passes() -> None:
    model = lora()
    optimizer = adamw(model)
    made = []

    def train() -> None:
        with LoraProbeMonitor(model, optimizer, verbose=False):
            for number, batch in enumerate(batches(40)):
                optimizer.zero_grad()
                next_token_loss(model, batch, number).backward()
                made.append(number)

    with pytest.raises(LoraProbeError, match="not one update"):
        train()
    assert len(made) <= 18


@pytest.mark.parametrize("verbose", [True, False])
def test_broken_estimator_is_unproven_and_said_once(
    verbose: bool, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def scalar(model: nn.Module, batch: Tensor) -> Tensor:
        return model(input_ids=batch, labels=batch).loss

    model = lora()
    optimizer = adamw(model)
    estimator = VarianceProbe([batches(1)[0]], scalar, every_n_steps=1)
    with LoraProbeMonitor(model, optimizer, estimator=estimator, verbose=verbose, every_n_steps=1) as probe:
        for number, batch in enumerate(batches(6)):
            next_token_loss(model, batch, number).backward()
            optimizer.step()
            optimizer.zero_grad()
    report = probe.report
    assert (report.status, report.exit_code) == ("unproven", 2)
    assert report.proofs["moved"].complete
    assert "estimator 'estimator'" in report.open_questions[0]
    told = capsys.readouterr().err if verbose else caplog.text
    assert told.count("LoRA probe: estimator 'estimator'") == 1


def test_internal_error_is_unproven_and_said_once_also_when_quiet(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lora_probe_callbacks.observe.model.layers import Layers

    def broken(self: Layers) -> list[float]:
        raise RuntimeError("ours")

    monkeypatch.setattr(Layers, "factors", broken)
    model = lora()
    *_, (_, probe) = plain(model)  # type: ignore[misc]
    assert (probe.report.status, probe.report.exit_code) == ("unproven", 2)
    assert "ours" in probe.report.why_unproven()[0]
    assert caplog.text.count("RuntimeError: ours") == 1


def test_record_that_ends_in_the_middle_is_unproven(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for _ in plain(lora(), record=path):
        pass
    assert read_runs(path)[0].report.status == "healthy"
    assert fractions(read_runs(path)[0].report) == dict.fromkeys(CLAIMS, (8, 8))
    half = tmp_path / "half.jsonl"
    half.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    (run,) = read_runs(half)
    assert (run.report.status, run.report.exit_code) == ("unproven", 2)
    assert "ends in the middle" in run.report.why_unproven()[-1]


# --- a part that does not train (P2, P4) -----------------------------------------------------------


def test_optimizer_that_never_steps_does_not_stop_the_judging_of_the_rest() -> None:
    model = lora(modules_to_save=["lm_head"])
    head = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    mine, other = AdamW(adapter_tensors(model).values(), lr=1e-3), AdamW(head, lr=1e-3)
    before = {name: t.detach().clone() for name, t in adapter_tensors(model).items()}
    with LoraProbeMonitor(model, [mine, other], verbose=False, every_n_steps=1, on_failure="stop") as probe:
        for number, batch in enumerate(batches(60)):
            next_token_loss(model, batch, number).backward()
            other.step()
            other.zero_grad()
    assert all(torch.equal(t, before[name]) for name, t in adapter_tensors(model).items()), "the truth"
    report = probe.report
    assert report.judged_steps >= 40
    assert report.status != "healthy"
    moved = report.proofs["moved"]
    assert (moved.proven, moved.expected) == (1, 9)
    assert "whose optimizer has not stepped" in moved.why
    (finding,) = report.with_status("fail", "warn")
    assert (finding.code, finding.cause) == ("LP401", "optimizer")
    assert finding.step <= 16


def test_layer_that_goes_dead_is_found_within_sixteen_steps() -> None:
    model = lora()
    optimizer = adamw(model)
    dead = {n: t for n, t in adapter_tensors(model).items() if "layers.1.self_attn.q_proj" in n}
    with LoraProbeMonitor(model, optimizer, verbose=False, every_n_steps=1, on_failure="stop") as probe:
        for number, batch in enumerate(batches(32)):
            next_token_loss(model, batch, number).backward()
            optimizer.step()
            optimizer.zero_grad()
            if number == 6:
                for tensor in dead.values():
                    tensor.data.zero_()
                    optimizer.state.pop(tensor)
    report = probe.report
    assert report.status == "unhealthy", str(report)
    (finding,) = report.failures
    assert finding.code == "LP503"
    assert finding.step <= 6 + PATIENCE
    assert set(report.proofs["moved"].missing) == set(dead)
    assert "LP503" in report.proofs["moved"].why


def test_part_detached_in_mid_run_ages() -> None:
    """One layer's adapter is frozen and stays where it is, while the others go on."""
    model = lora()
    optimizer = adamw(model)
    name, tensor = next((n, t) for n, t in adapter_tensors(model).items() if "layers.1.self_attn.v_proj.lora_B" in n)
    statuses = []
    with LoraProbeMonitor(model, optimizer, verbose=False, every_n_steps=1, on_failure="stop") as probe:
        for number, batch in enumerate(batches(30)):
            next_token_loss(model, batch, number).backward()
            if number > 4:
                tensor.grad = None
            optimizer.step()
            optimizer.zero_grad()
            statuses.append(name in probe.report.proofs["moved"].missing)
    assert statuses.index(True) - 4 <= PATIENCE + 4, "the first three are those in which it was new"
    assert probe.report.status != "healthy"


# --- idle is not unproven --------------------------------------------------------------------------


class Experts(nn.Module):
    """Of two experts one has tokens, until the other is called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.experts = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.head = nn.Linear(16, 64)
        self.both = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.experts[0](x)
        return self.head(y + self.experts[1](x) if self.both else y)


def train_experts(model: Any, both_from: int, steps: int) -> Iterator[LoraProbeMonitor]:
    optimizer = adamw(model)
    with LoraProbeMonitor(model, optimizer, verbose=False, every_n_steps=1) as probe:
        for number, ids in enumerate(batches(steps)):
            model.base_model.model.both = number >= both_from
            nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield probe


def expert_model() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(Experts(), LoraConfig(r=4, target_modules=["0", "1"]))


def test_expert_without_tokens_is_idle_and_the_run_is_healthy() -> None:
    *_, probe = train_experts(expert_model(), both_from=99, steps=8)
    proof = probe.report.proofs["moved"]
    assert (proof.proven, proof.expected, proof.idle) == (2, 2, 2)
    assert probe.report.status == "healthy", str(probe.report)
    assert "2 idle" in str(probe.report)


def test_expert_must_be_proven_once_it_has_run() -> None:
    reports = [(p.report.proofs["moved"].expected, p.report.status) for p in train_experts(expert_model(), 5, 10)]
    assert reports[4] == (2, "healthy")
    assert reports[5] == (4, "unproven")
    assert reports[-1] == (4, "healthy")


def test_layer_that_ran_without_gradients_is_not_idle() -> None:
    """It ran, and was not trained: that is never idle."""
    model = lora()
    inner = model.base_model.model.model.layers[1]
    forward = inner.forward

    def without(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return forward(*args, **kwargs)

    model.base_model.model.model.layers[1].forward = without
    model.enable_input_require_grads()
    optimizer = adamw(model)
    ids = batches(1)[0]
    with LoraProbeMonitor(model, optimizer, verbose=False, every_n_steps=1, on_failure="stop") as probe:
        for _ in range(6):
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
            hidden.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    proof = probe.report.proofs["reached"]
    assert proof.idle == 0
    assert proof.expected == 8
    assert probe.report.status != "healthy"


# --- the book by itself ----------------------------------------------------------------------------


def book(*decisions: Any) -> ProofBook:
    made = ProofBook(frozenset(CLAIMS))  # type: ignore[arg-type]
    for what in decisions:
        made.enter(what, {})
    return made


def step(number: int, **changes: Any) -> Any:
    return facts(step=number, framework_step=number, **changes)


def test_what_moves_without_a_gradient_is_not_proven_to_move() -> None:
    """Weight decay moves A while its gradient is exactly zero."""
    zero = {"gradients": [ZERO, GRADIENT] * 2, "updates": [MOVED] * 4}
    made = book(step(3, **zero), step(4, **zero))
    assert [int(made.proofs(ended=False)[c].proven) for c in ("reached", "moved")] == [2, 2]  # type: ignore[index]


def test_proof_ages_while_it_could_be_renewed() -> None:
    first = [step(3), step(4)]
    still = [step(5 + i, gradients=[GRADIENT] * 3 + [NONE], updates=[MOVED] * 3 + [STILL]) for i in range(PATIENCE)]
    assert book(*first, *still[:-1]).proofs(ended=False)["reached"].complete
    aged = book(*first, *still).proofs(ended=False)["reached"]
    assert aged.missing == ("layer.1.lora_B",)
    nobody = [step(5 + i, gradients=[ZERO] * 4, updates=[STILL] * 4) for i in range(PATIENCE)]
    assert book(*first, *nobody[:-1]).proofs(ended=False)["reached"].complete, "a pause without a signal"
    assert not book(*first, *nobody).proofs(ended=False)["reached"].proven
    assert book(*first, *nobody, step(60)).proofs(ended=False)["reached"].complete, "and the next signal"


def test_layers_that_take_turns_are_learned() -> None:
    def turn(start: int, which: int, length: int) -> list[Any]:
        own = [GRADIENT, GRADIENT, NONE, NONE] if which == 0 else [NONE, NONE, GRADIENT, GRADIENT]
        return [step(start + i, gradients=own) for i in range(length)]

    made = book(*turn(3, 0, 20), *turn(23, 1, 20))
    assert made.proofs(ended=False)["reached"].missing == ("layer.0.lora_A", "layer.0.lora_B"), "its first rest"
    for start, which in ((43, 0), (63, 1), (83, 0)):
        for what in turn(start, which, 20):
            made.enter(what, {})
        assert made.proofs(ended=False)["reached"].complete


def test_batches_in_which_a_layer_does_not_run_age_nothing() -> None:
    absent = [
        step(5 + i, called=[True, False], gradients=[GRADIENT, GRADIENT, NONE, NONE]) for i in range(2 * PATIENCE)
    ]
    assert book(step(3), step(4), *absent).proofs(ended=False)["reached"].complete


def test_frozen_a_is_not_asked_to_train() -> None:
    made = book(*(step(i, at={0: {"requires_grad": False}, 2: {"requires_grad": False}}) for i in (3, 4, 5)))
    assert made.proofs(ended=False)["moved"].expected == 2


def test_missing_proof_without_a_finding_says_that_no_check_explains_it() -> None:
    lost = [step(3 + i, gradients=[GRADIENT] * 3 + [NONE], updates=[MOVED] * 3 + [STILL]) for i in range(20)]
    assert "no check explains this" in book(*lost).proofs(ended=False)["reached"].why


def test_trainable_tensors_of_a_plain_model_make_no_proof() -> None:
    assert trainable(llama())  # a model without an adapter is refused
    with pytest.raises(ValueError, match="found no PEFT adapter"), LoraProbeMonitor(llama(), AdamW(trainable(llama()))):
        pass
