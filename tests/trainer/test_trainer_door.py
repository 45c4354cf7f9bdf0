"""The callback in the Transformers Trainer's own ways: accumulation, precision, compile, logs, resuming."""

from __future__ import annotations

import copy
import gc
import json
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.doors import RunTrainer, fit_trainer
from support.recipes import from_step
from support.training import (
    Training,
    adapter_tensors,
    hooks_of_the_probe,
    left_by_the_probe,
    llama,
    lora,
    next_token_loss,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_probe_callbacks import LoraProbeError, LoraProbeTrainerCallback, ProbeReport, faults

KEPT = {
    "lora_probe/healthy",
    "lora_probe/gradient/norm_B",
    "lora_probe/update/relative_norm",
    "lora_probe/reachability/loss_fraction",
}


def probe(**intent: Any) -> LoraProbeTrainerCallback:
    return LoraProbeTrainerCallback(**{"every_n_steps": 1, "verbose": False, **intent})


def assert_healthy(report: ProbeReport, *judged: str) -> None:
    assert report.healthy is True, str(report)
    assert not report.with_status("warn"), str(report)
    assert not report.internal_errors, report.internal_errors
    passed = {f.code for f in report.with_status("pass")}
    assert {"LP101", "LP103", "LP201", "LP302", "LP401", *judged} <= passed, str(report)


# --- healthy runs in every way that the Trainer has ----------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"max_grad_norm": 1e-3},
        {"bf16": True},
        {"bf16": True, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"warmup_steps": 3, "lr_scheduler_type": "cosine"},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_healthy_run_is_judged_and_nothing_is_found(options: dict[str, Any]) -> None:
    callback = probe()
    accumulate = options.pop("gradient_accumulation_steps", 1)
    fit_trainer(Training(lora(), accumulate=accumulate), callback, 6, **options)
    assert_healthy(callback.report, "LP104")
    assert callback.report.judged_steps == 6


def test_gradient_norm_is_the_one_after_clipping() -> None:
    callback = probe()
    fit_trainer(Training(lora()), callback, 3, max_grad_norm=1e-3)
    norms = [callback.report.metrics[f"lora_probe/gradient/norm_{role}"] for role in "AB"]
    assert sum(n * n for n in norms) ** 0.5 == pytest.approx(1e-3, rel=1e-2)


def test_evaluation_during_training_is_not_judged(tmp_path: Path) -> None:
    """Its forwards run merged and without gradients."""

    class Evaluates(TrainerCallback):
        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            model = kwargs["model"]
            model.merge_adapter()
            model.eval()
            with torch.no_grad():
                model(input_ids=torch.ones(1, 4, dtype=torch.long))
            model.train()
            model.unmerge_adapter()

    callback = probe()
    trainer = RunTrainer(Training(lora()), str(tmp_path), 5, [callback, Evaluates()])
    trainer.train()
    assert_healthy(callback.report)


# --- compiled ------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Dynamo asks for .grad of an input that transformers' input-gradient hook made require one (torch 2.13).
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_compiled_model_is_watched_from_outside_its_region(attached: bool, merged: bool, tmp_path: Path) -> None:
    seen: list[str] = []

    class Looks(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.extend(hooks_of_the_probe(kwargs["model"]))

    model, callback = lora(hook=merged, base=llama(layers=1)), probe()
    if merged:
        faults.left_merged(model)
    trainer = RunTrainer(
        Training(model),
        str(tmp_path),
        5,
        [Looks()] if attached else [callback, Looks()],
        torch_compile=True,
        torch_compile_backend="eager",
    )
    if attached:
        callback.attach(trainer)
    if not merged:
        trainer.train()
        assert_healthy(callback.report)
    else:
        with pytest.raises(LoraProbeError) as caught:
            trainer.train()
        assert [(f.code, f.step) for f in caught.value.findings] == [("LP103", 0)]
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    assert not seen
    assert not list(hooks_of_the_probe(trainer.model_wrapped))


# --- where the metrics go ------------------------------------------------------------------------


def probe_rows(history: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    rows = [row for row in history if "lora_probe/healthy" in row]
    assert len({row["step"] for row in rows}) == len(rows), "a step has several rows"
    return {row["step"]: row for row in rows}


def test_history_has_one_complete_row_for_each_probed_step() -> None:
    callback = probe(every_n_steps=6)
    trainer = fit_trainer(Training(lora()), callback, 8, logging_strategy="steps", logging_steps=1)
    rows = probe_rows(trainer.state.log_history)
    assert list(rows) == [1, 2, 3, 4, 7], "the steps 0 to 3 and 6, as the Trainer counts them"
    assert all(row.keys() >= KEPT for row in rows.values())
    assert set(rows) <= {row["step"] for row in trainer.state.log_history if "loss" in row}
    assert "train_runtime" in trainer.state.log_history[-1], "the summary of the run stays the last row"
    assert rows[7]["lora_probe/update/relative_norm"] == callback.report.metrics["lora_probe/update/relative_norm"]


def tensorboard_scalars(folder: Path) -> dict[str, dict[int, float]]:
    files = list(folder.rglob("events.out.*"))
    assert len(files) == 1, files
    events = EventAccumulator(str(files[0])).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    ours = [values for tag, values in scalars.items() if "lora_probe/" in tag]
    assert all(len({v.step for v in values}) == len(values) for values in ours), "a step came twice"
    return {tag: {v.step: v.value for v in values} for tag, values in scalars.items()}


def test_metrics_reach_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = fit_trainer(
        Training(lora()), probe(), 5, report_to=["tensorboard"], logging_strategy="steps", logging_steps=1
    )
    scalars = tensorboard_scalars(tmp_path / "events")
    rows = probe_rows(trainer.state.log_history)
    assert list(rows) == [1, 2, 3, 4, 5] == list(scalars["train/loss"])
    for name in KEPT:
        assert scalars[f"train/{name}"] == pytest.approx({step: row[name] for step, row in rows.items()})


def test_metrics_reach_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_CACHE_DIR": str(tmp_path),
        "WANDB_CONFIG_DIR": str(tmp_path),
        "WANDB_DATA_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, value)
    trainer = fit_trainer(Training(lora()), probe(), 5, report_to=["wandb"], run_name="probed")
    wandb.finish()
    wandb.teardown()  # waits for the process that writes the file
    rows = probe_rows(trainer.state.log_history)
    logged = dict(wandb_rows(next(tmp_path.rglob("*.wandb"))))
    assert list(rows) == [1, 2, 3, 4, 5]
    for name in KEPT:
        assert {s: row[f"train/{name}"] for s, row in logged.items()} == pytest.approx(
            {s: row[name] for s, row in rows.items()}
        )


def wandb_rows(file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Read W&B's own file of an offline run: LevelDB's log format, a protocol buffer in every record."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block that no header fits into
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # a complete record, or the last part of one
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(whole)
        whole = b""
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if "train/lora_probe/healthy" in row:
            yield row["train/global_step"], row


# --- stopping, resuming, training again ----------------------------------------------------------


def test_stop_ends_training_after_the_step_and_raises_nothing() -> None:
    callback = probe(on_failure="stop")
    run = Training(lora(hook=True), between_steps=from_step(3, lambda run: faults.left_merged(run.model)))
    trainer = fit_trainer(run, callback, 8)
    assert trainer.state.global_step == 4
    assert [(f.code, f.step) for f in callback.report.failures] == [("LP103", 3)]
    assert not list(hooks_of_the_probe(run.model))


class Randomness(nn.Module):
    """A loss that draws random numbers, so that a probe that draws any shows in the weights."""

    def __call__(self, model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return next_token_loss(model, batch, step) * (1 + 0.1 * torch.rand(()))


def stopped_and_resumed(folder: Path, watched: bool, restore: bool) -> tuple[nn.Module, list[Any]]:
    """Six steps, a checkpoint at the third, and the last three again in new objects."""
    callbacks = []
    options = {"save_strategy": "steps", "save_steps": 3, "seed": 1}
    for resume in (None, str(folder / "checkpoint-3")):
        run = Training(lora(lora_dropout=0.1), Randomness())
        callbacks.append(probe() if watched else None)
        trainer = RunTrainer(
            run,
            str(folder),
            6,
            [c for c in callbacks[-1:] if c],
            restore_callback_states_from_checkpoint=restore,
            **options,
        )
        trainer.number = 3 if resume else 0
        trainer.train(resume_from_checkpoint=resume)
    return run.model, callbacks


@pytest.mark.parametrize("restore", [False, True])
def test_resumed_run_is_bit_equal_and_knows_the_last_healthy_step(restore: bool, tmp_path: Path) -> None:
    plain, _ = stopped_and_resumed(tmp_path / "plain", watched=False, restore=restore)
    watched, callbacks = stopped_and_resumed(tmp_path / "watched", watched=True, restore=restore)
    straight = Training(lora(lora_dropout=0.1), Randomness())
    fit_trainer(straight, probe(), 6, seed=1)
    for name, tensor in adapter_tensors(plain).items():
        assert torch.equal(tensor, adapter_tensors(watched)[name])
        assert torch.equal(tensor, adapter_tensors(straight.model)[name])
    assert_healthy(callbacks[0].report)
    assert callbacks[1].report.judged_steps == 3, "the object that the user holds is the one that reports"
    stored = json.loads((tmp_path / "watched" / "checkpoint-3" / "trainer_state.json").read_text())
    assert stored["stateful_callbacks"]["LoraProbeTrainerCallback"]["attributes"]["_restored"]["baseline"]["step"] == 2


@pytest.mark.parametrize("restore", [False, True])
def test_fault_after_resuming_is_compared_with_the_run_before(restore: bool, tmp_path: Path) -> None:
    callback = probe()
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = lora(hook=True)
        if resume:
            faults.left_merged(model)
        trainer = RunTrainer(
            Training(model),
            str(tmp_path),
            3 if resume is None else 6,
            [callback := probe(on_failure="stop" if resume else "raise")],
            save_strategy="steps",
            save_steps=3,
            restore_callback_states_from_checkpoint=restore,
        )
        trainer.train(resume_from_checkpoint=resume)
    finding = callback.report.failures[0]
    assert (finding.code, finding.step, finding.framework_step) == ("LP103", 0, 3)
    assert finding.evidence["last healthy step"] == 2
    assert "'active': 4" in str(finding.evidence["changed since"])
    assert trainer.state.global_step == 4, "what is said now counts (stop), not what was said then (raise)"


def test_second_train_is_watched_anew(tmp_path: Path) -> None:
    callback, run = probe(on_failure="stop"), Training(lora(hook=True))
    trainer = RunTrainer(run, str(tmp_path), 5, [callback])
    trainer.train()
    first = callback.report
    assert_healthy(first)
    faults.left_merged(run.model)
    trainer.train()
    assert [(f.code, f.step) for f in callback.report.failures] == [("LP103", 0)]
    assert "last healthy step" not in callback.report.failures[0].evidence, "another run has no such step"
    assert callback.report is not first


def test_copy_of_a_callback_begins_anew() -> None:
    callback = probe(adapter="default")
    fit_trainer(Training(lora()), callback, 2)
    again = copy.deepcopy(callback)
    assert again is not callback
    assert isinstance(again, LoraProbeTrainerCallback)
    assert again.report.healthy is None
    fit_trainer(Training(lora()), again, 5)
    assert_healthy(again.report)


# --- exceptions ----------------------------------------------------------------------------------


class TroubleError(RuntimeError):
    """What the user's own code raises."""


class TroubledBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        raise TroubleError("backward")


class TroubledCallback(TrainerCallback):
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if args[1].global_step == 1:
            raise TroubleError("callback")


def troubled(where: str) -> Training:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        if step != 1:
            return next_token_loss(model, batch, step)
        if where == "forward":
            handle = model.get_decoder().layers[1].register_forward_pre_hook(lambda *_: raise_trouble("forward"))
            try:
                return next_token_loss(model, batch, step)
            finally:
                handle.remove()
        if where == "compute_loss":
            next_token_loss(model, batch, step)
            raise TroubleError("compute_loss")
        if where == "interrupt":
            raise KeyboardInterrupt
        value = next_token_loss(model, batch, step)
        return TroubledBackward.apply(value) if where == "backward" else value

    return Training(lora(), loss)


def raise_trouble(where: str) -> None:
    raise TroubleError(where)


@pytest.mark.parametrize("where", ["forward", "compute_loss", "backward", "callback", "interrupt"])
def test_attached_callback_leaves_nothing_behind_after_an_exception(where: str, tmp_path: Path) -> None:
    run, callback = troubled(where), probe()
    others = [TroubledCallback()] if where == "callback" else []
    trainer = RunTrainer(run, str(tmp_path), 4, others)
    before = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in run.model.named_modules()}
    attributes = {n: {*vars(m), "_is_accelerate_prepared"} for n, m in run.model.named_modules()}
    assert callback.attach(trainer).attach(trainer) is callback
    with pytest.raises(KeyboardInterrupt if where == "interrupt" else TroubleError) as caught:
        trainer.train()
    assert not getattr(caught.value, "__notes__", []), "nothing was wrong with the adapter"
    assert {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in run.model.named_modules()} == before
    assert all(set(vars(m)) <= attributes[n] for n, m in run.model.named_modules())
    inner = trainer.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks
    assert callback.report.judged_steps >= 1
    assert callback.report.status == "unproven", "it was left before A could move and be seen"
    assert callback.report.proofs["active"].complete


def test_what_an_exception_left_behind_goes_with_the_next_train_or_with_the_callback(tmp_path: Path) -> None:
    run, callback = troubled("callback"), probe()
    trainer = RunTrainer(run, str(tmp_path), 4, [callback, TroubledCallback()])
    with pytest.raises(TroubleError):
        trainer.train()
    trainer.pop_callback(TroubledCallback)
    trainer.number = 2
    trainer.train()
    assert not left_by_the_probe(run.model)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks

    run, callback = troubled("callback"), probe()
    trainer = RunTrainer(run, str(tmp_path), 4, [callback, TroubledCallback()])
    with pytest.raises(TroubleError):
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert optimizer._optimizer_step_pre_hooks, "the gap that attach() closes"
    trainer.pop_callback(callback)
    del callback
    gc.collect()
    assert not left_by_the_probe(run.model)
    assert not optimizer._optimizer_step_pre_hooks
    assert "training_step" not in vars(trainer)


@pytest.mark.parametrize("where", ["forward", "compute_loss", "backward", "interrupt"])
def test_an_exception_of_a_training_step_is_heard_without_attach(where: str, tmp_path: Path) -> None:
    run, callback = troubled(where), probe()
    trainer = RunTrainer(run, str(tmp_path), 4, [callback])
    with pytest.raises(KeyboardInterrupt if where == "interrupt" else TroubleError) as caught:
        trainer.train()
    assert not getattr(caught.value, "__notes__", []), "nothing was wrong with the adapter"
    assert not left_by_the_probe(run.model)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
    assert "training_step" not in vars(trainer)
    assert callback.report.status == "unproven"


@pytest.mark.parametrize("step", [0, 2])
def test_a_backward_that_raises_is_diagnosed_without_attach(step: int, tmp_path: Path) -> None:
    """The adapter is merged in the middle of training: torch says that nothing requires gradients, and not why."""
    run, callback = Training(lora(), between_steps=from_step(step, lambda run: faults.left_merged(run.model))), probe()
    trainer = RunTrainer(run, str(tmp_path), 4, [callback])
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        trainer.train()
    assert ["LP103" in note for note in caught.value.__notes__] == [True]
    assert [(f.code, f.step) for f in callback.report.failures] == [("LP103", step)]


def test_a_trainer_is_not_kept_alive(tmp_path: Path) -> None:
    trainer = RunTrainer(Training(lora()), str(tmp_path), 4, [probe()])
    trainer.train()
    held = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert held() is None


def test_a_training_step_of_the_users_own_is_put_back(tmp_path: Path) -> None:
    trainer = RunTrainer(Training(lora()), str(tmp_path), 4, [probe()])
    calls, own = [], trainer.training_step
    mine = trainer.training_step = lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1]
    trainer.train()
    assert trainer.training_step is mine
    assert len(calls) == 4


def test_attached_callback_says_on_the_users_exception_why_there_is_no_gradient(tmp_path: Path) -> None:
    model, callback = lora(), probe()
    faults.left_merged(model)
    trainer = RunTrainer(Training(model), str(tmp_path), 4, [])
    callback.attach(trainer)
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        trainer.train()
    assert ["LP103" in note for note in caught.value.__notes__] == [True]
    assert [(f.code, f.step) for f in callback.report.failures] == [("LP103", 0)]


def test_model_without_an_adapter_is_refused_when_training_starts(tmp_path: Path) -> None:
    callback, model = probe(), llama()
    trainer = RunTrainer(Training(model), str(tmp_path), 4, [callback])
    with pytest.raises(ValueError, match="found no PEFT adapter"):
        trainer.train()
    assert not left_by_the_probe(model)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
