"""Saves that a framework announces, and runs that go on from them, under the three front doors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.doors import RunTrainer
from support.training import (
    Loop,
    Training,
    adapter_tensors,
    batches,
    config,
    hooks_of_the_probe,
    lora,
    next_token_loss,
    trainable,
)
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbe, LoraProbeError, LoraProbeMonitor, LoraProbeTrainerCallback, ProbeReport

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:You.re resuming from a checkpoint that ended before"
)
FILE = "adapter_model.safetensors"
LP8 = {f"LP80{n}" for n in range(1, 8)}  # LP808 is judged without a file as well


def found(report: ProbeReport) -> list[tuple[str, str, int]]:
    assert not report.internal_errors, report.internal_errors[0]
    return [(f.code, f.status, f.step) for f in report.with_status("fail", "warn")]


def passed(report: ProbeReport) -> set[str]:
    assert not found(report), str(report)
    return {f.code for f in report.with_status("pass")} & LP8


def fast(model: nn.Module) -> AdamW:
    return AdamW(trainable(model), lr=1e-2)


def reversed_order(model: nn.Module) -> AdamW:
    """The same parameters, q and v of every layer exchanged: equal shapes, so nothing raises."""
    names = sorted(adapter_tensors(model), key=lambda n: (n.replace("q_proj", "z_proj"), n))
    return AdamW([adapter_tensors(model)[n] for n in names], lr=1e-2)


def square(**changes: Any) -> PeftModel:
    """q and v have one shape."""
    from support.training import llama

    return get_peft_model(llama(num_key_value_heads=4), config(**changes))


# --- Lightning ----------------------------------------------------------------------------------


def fit(
    module: pl.LightningModule, folder: Path, probe: LoraProbe, steps: int, *more: pl.Callback, **options: Any
) -> pl.Trainer:
    checkpoints = options.pop("checkpoints", {"every_n_train_steps": 2, "save_top_k": -1})
    saving = [ModelCheckpoint(folder, filename="{step}", **checkpoints)] if checkpoints is not None else []
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(saving),
        callbacks=[probe, *more, *saving],
        **options.pop("trainer", {}),
    )
    trainer.fit(module, DataLoader(batches(40), batch_size=None), **options)
    return trainer


class AdapterOnly(Loop):
    """A checkpoint without the base model, and a hook that spoils it."""

    def __init__(self, run: Training, spoil: Callable[[dict[str, Any]], dict[str, Any]] = lambda state: state) -> None:
        super().__init__(run)
        self.spoil = spoil
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = {k: v for k, v in checkpoint["state_dict"].items() if "lora_" in k}
        checkpoint["state_dict"] = self.spoil(state)


@pytest.mark.parametrize("make", [Loop, AdapterOnly])
def test_lightning_checkpoints_are_read_back(make: type[Loop], tmp_path: Path) -> None:
    probe = LoraProbe(verbose=False, every_n_steps=1)
    fit(make(Training(lora(), optimizer=fast)), tmp_path, probe, 5)
    assert passed(probe.report) == {"LP801", "LP807"}
    assert {f.last_step for f in probe.report.findings if f.code == "LP801"} == {4}
    last = max(tmp_path.glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    assert {"LP801", "LP807"} <= {f.code for f in probe.check_saved(last).with_status("pass")}


def test_lightning_save_between_probed_steps_is_judged_in_the_next_step(tmp_path: Path) -> None:
    probe = LoraProbe(verbose=False)
    fit(Loop(Training(lora(), optimizer=fast)), tmp_path, probe, 9, checkpoints={"every_n_train_steps": 8})
    assert [f.last_step for f in probe.report.findings if f.code == "LP801" and f.status == "pass"] == [7]


SPOILS = {
    "every B zero": (
        lambda s: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in s.items()},
        "every B in it is zero",
    ),
    "half of it": (lambda s: {k: v for k, v in s.items() if "layers.1" in k}, "lacks 4 of its 8"),
    "no B": (lambda s: {k: v for k, v in s.items() if "lora_A" in k}, "lacks 4 of its 8"),
    "empty": (lambda s: {k: torch.empty(0) for k in s}, "no elements"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_lightning_checkpoint_that_is_not_the_adapter_stops_the_run(name: str, tmp_path: Path) -> None:
    spoil, words = SPOILS[name]
    probe = LoraProbe(verbose=False)
    with pytest.raises(LoraProbeError, match=words):
        fit(AdapterOnly(Training(lora(), optimizer=fast), spoil), tmp_path, probe, 12)
    assert found(probe.report) == [("LP801", "fail", 1)]


def test_lightning_stale_copy_is_saved_again_and_again(tmp_path: Path) -> None:
    kept: dict[str, Any] = {}

    def stale(state: dict[str, Any]) -> dict[str, Any]:
        if not kept:
            kept.update(copy.deepcopy(state))
        return dict(kept)

    probe = LoraProbe(verbose=False)
    with pytest.raises(LoraProbeError, match="has not changed since the last save"):
        fit(AdapterOnly(Training(lora(), optimizer=fast), stale), tmp_path, probe, 12)
    assert found(probe.report) == [("LP801", "fail", 3)]


def test_lightning_weight_averaging_is_healthy(tmp_path: Path) -> None:
    average = WeightAveraging(avg_fn=lambda a, b, n: 0.5 * a + 0.5 * b)
    probe = LoraProbe(verbose=False, every_n_steps=1)
    fit(Loop(Training(lora(), optimizer=fast)), tmp_path, probe, 6, average)
    assert not found(probe.report), str(probe.report)
    average = WeightAveraging(avg_fn=lambda a, b, n: 0.5 * a + 0.5 * b)
    again = LoraProbe(verbose=False, every_n_steps=1)
    path = sorted(tmp_path.glob("*.ckpt"))[-1]
    fit(Loop(Training(lora(), optimizer=fast)), tmp_path / "2", again, 8, average, ckpt_path=path, weights_only=False)
    assert not found(again.report), str(again.report)


def test_lightning_rotated_checkpoints_and_save_last(tmp_path: Path) -> None:
    probe = LoraProbe(verbose=False)
    options = {"every_n_train_steps": 1, "save_top_k": 1, "save_last": True}
    fit(Loop(Training(lora(), optimizer=fast)), tmp_path, probe, 8, checkpoints=options)
    assert "LP801" in passed(probe.report)


def test_lightning_checkpoint_cut_short_does_not_stop_the_run(tmp_path: Path) -> None:
    class Cutting(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            for path in tmp_path.glob("*.ckpt"):
                data = path.read_bytes()
                path.write_bytes(data[: int(len(data) * 0.9)])

    probe = LoraProbe(verbose=False, every_n_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=8,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Cutting(), probe, ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)],
    )
    trainer.fit(Loop(Training(lora(), optimizer=fast)), DataLoader(batches(40), batch_size=None))
    assert {(code, status) for code, status, _ in found(probe.report)} == {("LP807", "warn")}
    assert trainer.global_step == 8


def test_lightning_checkpoint_written_by_another_thread(tmp_path: Path) -> None:
    probe = LoraProbe(verbose=False, every_n_steps=1)
    fit(Loop(Training(lora(), optimizer=fast)), tmp_path, probe, 6, trainer={"plugins": [AsyncCheckpointIO()]})
    assert {"LP801", "LP807"} <= passed(probe.report)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The 'test_dataloader' does not have")
def test_lightning_file_loaded_for_a_test_is_no_resume(lightning_checkpoint: Path, tmp_path: Path) -> None:
    class Tested(Loop):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.run.loss(self.model, batch, batch_idx)

    probe = LoraProbe(verbose=False, every_n_steps=1)
    module = Tested(Training(square(), optimizer=fast))
    data = DataLoader(batches(2), batch_size=None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[probe],
    )
    trainer.test(module, data, ckpt_path=lightning_checkpoint, weights_only=False, verbose=False)
    trainer.fit(Loop(Training(square(), optimizer=fast)), data)
    assert not found(probe.report), str(probe.report)


def test_lightning_compiled_model_keeps_its_names_in_its_own_checkpoint(tmp_path: Path) -> None:
    model = lora()
    optimizer = fast(model)
    probe = LoraProbe(verbose=False, every_n_steps=1)
    run = Training(torch.compile(model, backend="eager"), optimizer=optimizer)
    fit(Loop(run), tmp_path, probe, 4)
    assert passed(probe.report) == {"LP801", "LP807"}


@pytest.fixture(scope="module")
def lightning_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lightning")
    fit(Loop(Training(square(), optimizer=fast)), folder, LoraProbe(verbose=False, every_n_steps=1), 4)
    return max(folder.glob("*.ckpt"), key=lambda p: p.stat().st_mtime)


def test_lightning_resume_is_recognised(lightning_checkpoint: Path, tmp_path: Path) -> None:
    probe = LoraProbe(verbose=False, every_n_steps=1)
    module = Loop(Training(square(), optimizer=fast))
    fit(module, tmp_path, probe, 6, ckpt_path=lightning_checkpoint, weights_only=False)
    assert {"LP803", "LP804", "LP806"} <= passed(probe.report)


class Rewrapping(Loop):
    """B04: the checkpoint is loaded, and then the model is wrapped again."""

    def on_train_start(self) -> None:
        for tensor in adapter_tensors(self.model).values():
            nn.init.normal_(tensor, std=0.02)
        for name, tensor in adapter_tensors(self.model).items():
            if "lora_B" in name:
                nn.init.zeros_(tensor)


class OneLayerLost(Loop):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        self.strict_loading = False
        checkpoint["state_dict"] = {k: v for k, v in state.items() if "layers.1." not in k}


class NothingFound(Loop):
    """K08: the prefix of another LightningModule, and strict=False."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.strict_loading = False
        checkpoint["state_dict"] = {f"model.{k}": v for k, v in checkpoint["state_dict"].items()}


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Rewrapping, "its adapter is fresh"),
        (NothingFound, "its adapter is fresh"),
        (OneLayerLost, "4 of 8 adapter tensors"),
    ],
)
def test_lightning_resume_that_starts_anew(
    module: type[Loop], words: str, lightning_checkpoint: Path, tmp_path: Path
) -> None:
    probe = LoraProbe(verbose=False)
    with pytest.raises(LoraProbeError, match=words):
        fit(
            module(Training(square(), optimizer=fast)),
            tmp_path,
            probe,
            6,
            ckpt_path=lightning_checkpoint,
            weights_only=False,
        )
    assert found(probe.report) == [("LP803", "fail", 0)]


def test_lightning_optimizer_state_on_the_wrong_tensors(lightning_checkpoint: Path, tmp_path: Path) -> None:
    """E09."""
    probe = LoraProbe(verbose=False)
    with pytest.raises(LoraProbeError, match=r"has that of .*v_proj"):
        fit(
            Loop(Training(square(), optimizer=reversed_order)),
            tmp_path,
            probe,
            6,
            ckpt_path=lightning_checkpoint,
            weights_only=False,
        )
    assert found(probe.report) == [("LP804", "fail", 0)]


# --- Transformers Trainer -----------------------------------------------------------------------


def train(
    run: Training, folder: Path, steps: int, probe: LoraProbeTrainerCallback, resume: Path | None = None, **options: Any
) -> RunTrainer:
    settings = {"save_strategy": "steps", "save_steps": 2, **options}
    trainer = RunTrainer(run, str(folder), steps, [probe], **settings)
    kind = options.pop("kind", None)
    if kind is not None:
        trainer.__class__ = kind
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def test_trainer_checkpoints_are_read_back(tmp_path: Path) -> None:
    probe = LoraProbeTrainerCallback(verbose=False)
    train(Training(lora(), optimizer=fast), tmp_path, 7, probe)
    assert passed(probe.report) == {"LP801", "LP802", "LP805", "LP807"}
    assert [f.last_step for f in probe.report.findings if f.code == "LP801"] == [6]
    assert json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["stateful_callbacks"]
    for number in (2, 4, 6):  # each as it was when it was written
        assert probe.check_saved(tmp_path / f"checkpoint-{number}").healthy is True


def test_trainer_of_a_compiled_model_writes_an_empty_file(tmp_path: Path) -> None:
    model = lora()
    probe = LoraProbeTrainerCallback(verbose=False)
    run = Training(torch.compile(model, backend="eager"), optimizer=fast(model))
    with pytest.raises(LoraProbeError, match="lacks 8 of its 8"):
        train(run, tmp_path, 6, probe)
    assert found(probe.report) == [("LP801", "fail", 1)]
    assert not load_file(tmp_path / "checkpoint-2" / FILE)  # transformers 5.23 with peft 0.21


def test_trainer_with_several_adapters(tmp_path: Path) -> None:
    model = lora()
    model.add_adapter("policy", config(r=8))
    model.set_adapter("policy")
    probe = LoraProbeTrainerCallback(verbose=False, adapter="policy", reference_adapters=("default",))
    train(Training(model, optimizer=fast), tmp_path, 3, probe)
    assert passed(probe.report) >= {"LP801", "LP802"}


def test_trainer_of_native_adapters(tmp_path: Path) -> None:
    from support.training import llama

    model = llama()
    model.add_adapter(config())
    probe = LoraProbeTrainerCallback(verbose=False)
    train(Training(model, optimizer=fast), tmp_path, 3, probe)
    assert passed(probe.report) >= {"LP801", "LP802"}


@pytest.fixture(scope="module")
def trainer_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    train(Training(square(), optimizer=fast), folder, 4, LoraProbeTrainerCallback(verbose=False))
    return folder / "checkpoint-4"


def test_trainer_resume_is_recognised(trainer_checkpoint: Path) -> None:
    probe = LoraProbeTrainerCallback(verbose=False, every_n_steps=1)
    train(Training(square(), optimizer=fast), trainer_checkpoint.parent, 6, probe, trainer_checkpoint)
    assert {"LP803", "LP804", "LP806"} <= passed(probe.report)


def test_trainer_resume_without_the_optimizer_by_intent(tmp_path: Path) -> None:
    first = LoraProbeTrainerCallback(verbose=False)
    train(Training(square(), optimizer=fast), tmp_path, 4, first, save_only_model=True)
    probe = LoraProbeTrainerCallback(verbose=False, every_n_steps=1)
    run = Training(square(), optimizer=fast)
    train(run, tmp_path, 6, probe, tmp_path / "checkpoint-4", save_only_model=True)
    assert {"LP803", "LP806"} <= passed(probe.report)
    assert [f.status for f in probe.report.findings if f.code == "LP804"] == ["skipped"]


class Forgetful(RunTrainer):
    """K07: the step counter is restored, the adapter is not."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_trainer_resume_with_a_new_adapter(trainer_checkpoint: Path) -> None:
    probe = LoraProbeTrainerCallback(verbose=False)
    run = Training(square(), optimizer=fast)
    trainer = Forgetful(run, str(trainer_checkpoint.parent), 6, [probe])
    with pytest.raises(LoraProbeError, match="its adapter is fresh"):
        trainer.train(resume_from_checkpoint=str(trainer_checkpoint))
    assert found(probe.report) == [("LP803", "fail", 0)]


def test_trainer_resume_of_a_run_that_had_no_probe(trainer_checkpoint: Path) -> None:
    state = trainer_checkpoint / "trainer_state.json"
    before = state.read_text()
    content = json.loads(before)
    content["stateful_callbacks"].pop("LoraProbeTrainerCallback")
    state.write_text(json.dumps(content))
    try:
        probe = LoraProbeTrainerCallback(verbose=False)
        trainer = Forgetful(Training(square(), optimizer=fast), str(trainer_checkpoint.parent), 6, [probe])
        with pytest.raises(LoraProbeError, match="the live adapter is fresh"):
            trainer.train(resume_from_checkpoint=str(trainer_checkpoint))
        assert found(probe.report) == [("LP803", "fail", 0)]
        healthy = LoraProbeTrainerCallback(verbose=False)
        train(Training(square(), optimizer=fast), trainer_checkpoint.parent, 6, healthy, trainer_checkpoint)
        assert "LP803" in passed(healthy.report)
    finally:
        state.write_text(before)


def test_trainer_resume_from_names_that_nothing_matches(trainer_checkpoint: Path, tmp_path: Path) -> None:
    """K03, and what a compiled run leaves: the load says nothing."""
    import shutil

    place = tmp_path / trainer_checkpoint.name
    shutil.copytree(trainer_checkpoint, place)
    save_file({f"_orig_mod.{k}": v for k, v in load_file(place / FILE).items()}, place / FILE)
    probe = LoraProbeTrainerCallback(verbose=False)
    with pytest.raises(LoraProbeError, match="its adapter is fresh"):
        train(Training(square(), optimizer=fast), tmp_path, 6, probe, place)
    assert found(probe.report) == [("LP803", "fail", 0)]


def test_trainer_resume_with_parameters_in_another_order(trainer_checkpoint: Path) -> None:
    probe = LoraProbeTrainerCallback(verbose=False)
    with pytest.raises(LoraProbeError, match="not theirs"):
        train(Training(square(), optimizer=reversed_order), trainer_checkpoint.parent, 6, probe, trainer_checkpoint)
    assert found(probe.report) == [("LP804", "fail", 0)]


# --- Accelerate and plain loops -----------------------------------------------------------------


def loop(model: nn.Module, optimizer: Any, probe: LoraProbeMonitor, steps: int, after: Callable[[int], None]) -> None:
    with probe:
        for step, batch in enumerate(batches(steps)):
            next_token_loss(model, batch, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            after(step)


def prepared(model: nn.Module | None = None) -> tuple[Accelerator, nn.Module, Any, LoraProbeMonitor]:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model = square() if model is None else model
    model, optimizer = accelerator.prepare(model, fast(model))
    probe = LoraProbeMonitor(model, optimizer, accelerator=accelerator, log=lambda *a: None, verbose=False)
    accelerator.register_for_checkpointing(probe)
    return accelerator, model, optimizer, probe


def test_accelerate_save_state_is_read_back_and_the_run_recognised(tmp_path: Path) -> None:
    accelerator, model, optimizer, probe = prepared()
    loop(model, optimizer, probe, 6, lambda step: accelerator.save_state(str(tmp_path)) and None if step == 4 else None)
    assert passed(probe.report) == {"LP801", "LP807"}
    assert not accelerator._save_model_state_pre_hook
    again, model, optimizer, probe = prepared()
    again.load_state(str(tmp_path))
    loop(model, optimizer, probe, 2, lambda step: None)
    assert {"LP803", "LP804", "LP806"} <= passed(probe.report)


@pytest.mark.parametrize("lost", [True, False])
def test_accelerate_hook_that_spoils_the_save(lost: bool, tmp_path: Path) -> None:
    accelerator, model, optimizer, probe = prepared()

    def spoil(models: Any, weights: list[dict[str, Any]], folder: str) -> None:
        for name in list(weights[0]):
            if "lora_B" in name:
                weights[0][name] = torch.zeros_like(weights[0][name])
            if lost and "layers.0" in name:
                del weights[0][name]

    accelerator.register_save_state_pre_hook(spoil)
    words = "lacks 4 of its 8" if lost else "every B in it is zero"
    with pytest.raises(LoraProbeError, match=words):
        loop(model, optimizer, probe, 9, lambda s: accelerator.save_state(str(tmp_path)) and None if s == 5 else None)
    assert found(probe.report) == [("LP801", "fail", 5)]


def test_accelerate_state_of_another_run_is_rolled_back_to_in_training(tmp_path: Path) -> None:
    """A load in the middle of a run is compared as well, and a right one is healthy."""
    accelerator, model, optimizer, probe = prepared()

    def after(step: int) -> None:
        if step == 2:
            accelerator.save_state(str(tmp_path))
        if step == 5:
            accelerator.load_state(str(tmp_path))

    loop(model, optimizer, probe, 8, after)
    assert {"LP801", "LP803", "LP804"} <= passed(probe.report)


def plain_state(model: nn.Module, optimizer: AdamW) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    probe = LoraProbeMonitor(model, optimizer, verbose=False)
    loop(model, optimizer, probe, 3, lambda step: None)
    state = json.loads(json.dumps(probe.state_dict()))
    return state, copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())


@pytest.fixture(scope="module")
def saved() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    model = square()
    return plain_state(model, fast(model))


def resumed(model: nn.Module, optimizer: Any, state: dict[str, Any], **intent: Any) -> ProbeReport:
    probe = LoraProbeMonitor(model, optimizer, verbose=False, on_failure="warn", **intent)
    probe.load_state_dict(state)
    loop(model, optimizer, probe, 1, lambda step: None)
    assert not list(hooks_of_the_probe(model))
    return probe.report


@pytest.mark.filterwarnings("ignore::lora_probe_callbacks.LoraProbeWarning")
class TestPlainResume:
    def test_right(self, saved: Any) -> None:
        state, weights, moments = saved
        model = square()
        model.load_state_dict(weights)
        optimizer = fast(model)
        optimizer.load_state_dict(moments)
        assert {"LP803", "LP804", "LP806"} <= passed(resumed(model, optimizer, state))

    def test_compiled_and_in_other_precision(self, saved: Any) -> None:
        state, weights, _ = saved
        model = square()
        model.load_state_dict(weights)
        for tensor in adapter_tensors(model).values():
            tensor.data = tensor.data.bfloat16()
        model.base_model.model.to(torch.bfloat16)
        optimizer = fast(model)
        report = resumed(torch.compile(model, backend="eager"), optimizer, state, ignore=["LP804"])
        assert {"LP803", "LP806"} <= passed(report)

    def test_wrapped_again(self, saved: Any) -> None:
        """B04."""
        state, weights, _ = saved
        model = square()
        model.load_state_dict(weights)
        with pytest.warns(UserWarning, match="multiple adapters|second time|already"):
            model = get_peft_model(model.base_model.model, config())
        assert [(c, s) for c, s, _ in found(resumed(model, fast(model), state))] == [("LP803", "fail")]

    def test_two_layers_exchanged(self, saved: Any) -> None:
        state, weights, moments = saved
        swap = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
        moved = {
            next((k.replace(a, b) for a, b in swap.items() if a in k and "lora_" in k), k): v
            for k, v in weights.items()
        }
        model = square()
        model.load_state_dict(moved)
        optimizer = fast(model)
        optimizer.load_state_dict(moments)
        report = resumed(model, optimizer, state)
        assert [(c, s) for c, s, _ in found(report)] == [("LP803", "fail")]
        assert "8 of 8" in report.failures[0].message

    def test_fewer_targets(self, saved: Any) -> None:
        state, weights, _ = saved
        model = square(target_modules=["q_proj"])
        model.load_state_dict(weights, strict=False)
        report = resumed(model, fast(model), state, ignore=["LP804"])
        assert [(c, s) for c, s, _ in found(report)] == [("LP803", "fail")]
        assert "4 adapter tensors" in report.failures[0].message

    @pytest.mark.parametrize("zeroed", [True, False])
    def test_optimizer_state_lost(self, zeroed: bool, saved: Any) -> None:
        state, weights, moments = saved
        model = square()
        model.load_state_dict(weights)
        optimizer = fast(model)
        if zeroed:
            moments = copy.deepcopy(moments)
            for entry in moments["state"].values():
                entry["exp_avg"].zero_()
            optimizer.load_state_dict(moments)
        report = resumed(model, optimizer, state)
        assert [(c, s) for c, s, _ in found(report)] == [("LP804", "fail" if zeroed else "warn")]

    def test_parameter_groups_exchanged(self) -> None:
        def groups(model: nn.Module, first: str) -> AdamW:
            a = [p for n, p in adapter_tensors(model).items() if first in n]
            b = [p for n, p in adapter_tensors(model).items() if first not in n]
            return AdamW([{"params": a, "lr": 1e-2}, {"params": b, "lr": 1e-3}])

        model = square()
        optimizer = groups(model, "lora_A")
        state, weights, _ = plain_state(model, optimizer)
        again = square()
        again.load_state_dict(weights)
        other = groups(again, "lora_B")
        for before, after in zip(adapter_tensors(model).values(), adapter_tensors(again).values(), strict=True):
            other.state[after] = copy.deepcopy(optimizer.state[before])
        report = resumed(again, other, state)
        assert [(c, s) for c, s, _ in found(report)] == [("LP804", "fail")]
        assert "learning rates that were others'" in report.failures[0].message

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_adapter_of_a_residual_on_the_original_base(self, init: str) -> None:
        """J09."""
        model = square(init_lora_weights=init)
        state, weights, _ = plain_state(model, fast(model))
        again = square()
        again.load_state_dict({k: v for k, v in weights.items() if "lora_" in k}, strict=False)
        report = resumed(again, fast(again), state, ignore=["LP804"])
        assert [(c, s) for c, s, _ in found(report)] == [("LP806", "fail")]
        right = square(init_lora_weights=init)
        right.load_state_dict({k: v for k, v in weights.items() if "lora_" in k}, strict=False)
        assert "LP806" in passed(resumed(right, fast(right), state, ignore=["LP804"]))

    def test_another_seed_of_the_base(self, saved: Any) -> None:
        state, weights, _ = saved
        model = square()
        model.load_state_dict({k: v for k, v in weights.items() if "lora_" in k}, strict=False)
        for name, tensor in model.named_parameters():
            if "base_layer" in name:
                nn.init.normal_(tensor, std=0.02)
        assert [(c, s) for c, s, _ in found(resumed(model, fast(model), state, ignore=["LP804"]))] == [
            ("LP806", "fail")
        ]

    def test_file_compared_before_the_first_step(self, saved: Any, tmp_path: Path) -> None:
        """K04 and K05: the load found nothing, and the user asks."""
        _, weights, _ = saved
        model = square()
        model.load_state_dict(weights)
        model.save_pretrained(tmp_path)
        again = square()
        optimizer = fast(again)
        with LoraProbeMonitor(again, optimizer, verbose=False, on_failure="warn") as probe:
            assert [f.code for f in probe.check_saved(tmp_path).failures] == ["LP803"]
            again.load_state_dict(weights)
            assert probe.check_saved(tmp_path).healthy is True


def test_training_with_saves_is_bit_equal(tmp_path: Path) -> None:
    def run(probed: bool) -> dict[str, torch.Tensor]:
        model = square()
        optimizer = fast(model)
        torch.manual_seed(3)
        probe = LoraProbeMonitor(model, optimizer, verbose=False, every_n_steps=1, ignore=() if probed else ("LP8",))

        def save(step: int) -> None:
            model.save_pretrained(tmp_path)
            probe.check_saved(tmp_path)

        loop(model, optimizer, probe, 5, save)
        return {**model.state_dict(), "rng": torch.get_rng_state()}

    with_files, without = run(True), run(False)
    assert all(torch.equal(with_files[k], without[k]) for k in without)
