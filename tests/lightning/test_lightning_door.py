"""The callback in Lightning's own ways: compile, resume, loggers, progress bar, printing, policies, errors inside."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch._dynamo
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from peft import get_peft_model
from support.tiny import (
    CORE,
    Batches,
    Task,
    adamw,
    assert_healthy,
    fit,
    language_loss,
    llama,
    lora,
    peft_llama,
    token_batches,
)
from torch import nn

from lora_probe_callbacks import (
    AdapterActivationCallback,
    GradientReachabilityCallback,
    LoraProbe,
    LoraProbeError,
    LoraProbeWarning,
    WrapperIdentityCallback,
)
from lora_probe_callbacks.checks import _catalogue as catalogue
from lora_probe_callbacks.checks._base import Check
from lora_probe_callbacks.facts import Facts
from lora_probe_callbacks.report.record import read_record


def checkpointed() -> nn.Module:
    """With the input-gradient hook a merged adapter does not make backward() fail."""
    base = llama()
    base.enable_input_require_grads()
    return peft_llama(base)


def merges_at(bad: int) -> Any:
    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        if index == bad:
            task.model.merge_adapter()
        return language_loss(task, ids, index)

    return step


# --- torch.compile -------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x).tanh()).tanh())


def small() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Small(), lora(target_modules=["first", "second"]))


def square(task: Task, x: torch.Tensor, index: int) -> torch.Tensor:
    return (task.model(x) - 1).square().mean()


def vectors(count: int = 8) -> Batches:
    return Batches(list(torch.randn(count, 4, 8, generator=torch.Generator().manual_seed(1))))


def compiled_module(backend: str) -> Task:
    return Task(torch.compile(small(), backend=backend), square)


def compiled_in_place(backend: str) -> Task:
    task = Task(small(), square)
    task.model.compile(backend=backend)
    return task


def compiled_layer(backend: str) -> Task:
    task = Task(small(), square)
    task.model.get_base_model().second.compile(backend=backend)
    return task


def compiled_forward(backend: str) -> Task:
    task = Task(small(), square)
    base = task.model.get_base_model()
    base.forward = torch.compile(base.forward, backend=backend)
    return task


def compiled_task(backend: str) -> pl.LightningModule:
    return torch.compile(Task(small(), square), backend=backend)


def compiled_function(backend: str) -> Task:
    function = torch.compile(lambda model, x: (model(x) - 1).square().mean(), backend=backend)
    return Task(small(), lambda task, x, index: function(task.model, x))


def compiled_training_step(backend: str) -> Task:
    task = Task(small(), square)
    task.training_step = torch.compile(task.training_step, backend=backend)
    return task


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compilation_of(task: pl.LightningModule, probe: LoraProbe | None) -> dict[str, dict[str, int]]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fit(task, probe, vectors())
    counters = torch._dynamo.utils.counters
    return {name: dict(counters[name]) for name in ("stats", "frames", "graph_break", "recompiles")}


# torch 2.13's dynamo (safe_has_grad) looks at .grad of what enters a compiled layer
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "make",
    [
        compiled_module,
        compiled_in_place,
        compiled_layer,
        compiled_forward,
        compiled_task,
        compiled_training_step,
    ],
    ids=lambda make: make.__name__,
)
def test_compile(make, backend):
    probe = LoraProbe(every_n_steps=1, verbose=False)
    without = compilation_of(make(backend), None)
    assert without["stats"], "the recipe must compile something"
    assert compilation_of(make(backend), probe) == without
    assert_gradients_judged(probe)


def assert_gradients_judged(probe: LoraProbe) -> None:
    report = probe.report
    assert not report.with_status("fail", "warn"), str(report)
    assert not report.internal_errors
    passed = {f.code for f in report.with_status("pass") if f.last_step >= 6}
    assert {"LP201", "LP203", "LP302", "LP303", "LP401"} <= passed, str(report)


@pytest.mark.usefixtures("dynamo")
def test_compiled_function_that_calls_the_model():
    """Nothing on the module tells of it: the hooks of the first step are traced, and none is installed again."""
    probe = LoraProbe(every_n_steps=1, verbose=False)
    without = compilation_of(compiled_function("eager"), None)
    watched = compilation_of(compiled_function("eager"), probe)
    assert watched["graph_break"] == without["graph_break"] == {}
    assert watched["stats"]["unique_graphs"] == without["stats"]["unique_graphs"] + 1
    assert_gradients_judged(probe)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("make", [compiled_module, compiled_in_place, compiled_forward, compiled_task])
def test_no_hook_below_the_compiled_region(make):
    task, seen = make("eager"), []

    class Looks(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, task: pl.LightningModule, loss: torch.Tensor) -> None:
            seen.append([len(m._forward_hooks) + len(m._forward_pre_hooks) for m in small_parts(task)])

    def small_parts(task: pl.LightningModule) -> list[nn.Module]:
        return [m for m in task.modules() if isinstance(m, nn.Linear) or hasattr(m, "lora_A")]

    fit(task, LoraProbe(every_n_steps=1, verbose=False), vectors(3), callbacks=[Looks()])
    assert seen
    assert not any(map(sum, seen))


@pytest.mark.usefixtures("dynamo")
def test_fault_under_compile_is_found():
    class Disables(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, task: Task) -> None:
            for p in task.parameters():
                p.requires_grad_(False)
            task.model._orig_mod.get_base_model().out.requires_grad_(True)

    def optimizers(task: Task) -> torch.optim.Optimizer:
        return torch.optim.AdamW(task.parameters(), lr=1e-2)

    task = Task(torch.compile(small(), backend="eager"), square, optimizers)
    with pytest.raises(LoraProbeError, match="LP203"):
        fit(task, LoraProbe(verbose=False), vectors(), callbacks=[Disables()])


# --- how long, how often, from where -------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 3}, 3),
        ({"limit_train_batches": 5}, 5),
        ({"max_steps": 5}, 5),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8),
        ({"limit_train_batches": 0}, 0),
        ({"num_sanity_val_steps": 2}, 20),
    ],
    ids=str,
)
def test_length_of_the_run(settings, steps):
    probe = LoraProbe(every_n_steps=1, verbose=False)
    trainer = fit(Task(peft_llama()), probe, **settings)
    assert trainer.global_step == steps
    assert not probe.report.with_status("fail", "warn"), str(probe.report)
    if steps == 0:
        assert probe.report.healthy is None
        return
    # One step moves B alone, and no forward sees it.
    assert probe.report.status == ("healthy" if steps > 1 else "unproven"), str(probe.report)
    assert max(f.framework_step for f in probe.report.with_status("pass")) >= steps - 1


def test_cadence(tmp_path: Path):
    record = tmp_path / "record.jsonl"
    fit(Task(peft_llama()), LoraProbe(every_n_steps=6, verbose=False, record=record))
    steps = [line["step"] for line in read_record(record) if line["kind"] == "decision" and line["moment"] == "step"]
    gradients = [line["step"] for line in read_record(record) if line["kind"] == "decision" and line["gradients"]]
    assert gradients == [0, 1, 2, 3, 6, 12, 18]
    assert set(gradients) <= set(steps)


def test_resume_takes_the_baseline_along(tmp_path: Path):
    path = tmp_path / "half.ckpt"
    trainer = fit(Task(checkpointed()), LoraProbe(verbose=False), token_batches(4))
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"]
    assert "active_adapters" in str(saved)

    probe = LoraProbe(verbose=False, adapter="default")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, max_epochs=2, callbacks=[probe])  # fmt: skip
    with pytest.raises(LoraProbeError, match="LP103") as error:
        trainer.fit(Task(checkpointed(), merges_at(0)), token_batches(4), ckpt_path=path)
    finding = error.value.findings[0]
    assert finding.evidence["last healthy step"] == 3
    assert "'active': 4} -> {'merged': 4}" in str(finding.evidence["changed since"])
    assert finding.framework_step == 4
    assert finding.step == 0


def test_state_survives_a_run_that_never_started(tmp_path: Path):
    probe = LoraProbe(verbose=False)
    probe.load_state_dict({"baseline": {"step": 7}})
    assert probe.state_dict() == {"baseline": {"step": 7}}


def test_two_epochs_are_one_session():
    probe = LoraProbe(every_n_steps=1, verbose=False)
    fit(Task(peft_llama()), probe, token_batches(6), max_epochs=2)
    assert max(f.last_step for f in probe.report.with_status("pass")) == 11


# --- precision and optimizers --------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true"])
def test_precision(precision):
    settings: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        from lightning.pytorch.plugins import MixedPrecision

        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]}
    probe = LoraProbe(every_n_steps=1, verbose=False)
    fit(Task(peft_llama(), optimizers=lambda task: adamw(task, lr=5e-2)), probe, **settings)
    assert_healthy(probe.report)
    if precision == "16-mixed":
        assert probe.report.metrics["lora_probe/gradient/norm_B"] < 1e3, "the norm must be unscaled"


def test_manual_optimization_with_a_closure():
    def step(task: Task, ids: torch.Tensor, index: int) -> None:
        optimizer = task.optimizers()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = language_loss(task, ids, index)
            task.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)

    probe = LoraProbe(every_n_steps=1, verbose=False)
    fit(Task(peft_llama(), step, automatic=False), probe)
    assert_healthy(probe.report)


def test_framework_step_counts_as_lightning_does():
    """With two optimizers, global_step rises by two for each batch."""

    def step(task: Task, ids: torch.Tensor, index: int) -> None:
        if index == 3:
            task.model.merge_adapter()
        for optimizer in task.optimizers():
            optimizer.zero_grad()
        task.manual_backward(language_loss(task, ids, index))
        for optimizer in task.optimizers():
            optimizer.step()

    def optimizers(task: Task) -> list[torch.optim.Optimizer]:
        tensors = [p for p in task.parameters() if p.requires_grad]
        return [torch.optim.AdamW(tensors[0::2], lr=1e-2), torch.optim.AdamW(tensors[1::2], lr=1e-2)]

    probe = LoraProbe(every_n_steps=1, verbose=False)
    with pytest.raises(LoraProbeError) as error:
        fit(Task(checkpointed(), step, optimizers, automatic=False), probe)
    finding = error.value.findings[0]
    assert (finding.code, finding.step, finding.framework_step) == ("LP103", 3, 6)


# --- loggers and the progress bar ----------------------------------------------------------------


NAMES = {
    "lora_probe/healthy",
    "lora_probe/overhead_ms",
    "lora_probe/activation/active_fraction",
    "lora_probe/identity/optimizer_coverage",
    "lora_probe/identity/forward_coverage",
    "lora_probe/reachability/loss_fraction",
    "lora_probe/gradient/norm_A",
    "lora_probe/gradient/norm_B",
    "lora_probe/update/relative_norm",
    "lora_probe/update/moved_fraction_A",
    "lora_probe/update/moved_fraction_B",
    *(f"lora_probe/proven/{claim}" for claim in ("supervised", "active", "reached", "owned", "moved", "seen")),
    *(f"lora_probe/supervision/{name}_fraction" for name in ("token", "empty_row", "stop_token")),
}
STEP_RESPONSE = {f"lora_probe/step_response/{name}" for name in ("predicted", "measured", "ratio")}


def logged_csv(folder: Path) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            values = {k: float(v) for k, v in row.items() if k.startswith("lora_probe/") and v}
            rows.setdefault(int(row["step"]), {}).update(values)
    return rows


def logged_tensorboard(folder: Path) -> dict[int, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    rows: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            if tag.startswith("lora_probe/"):
                rows.setdefault(event.step, {})[tag] = event.value
    return rows


def test_metrics_reach_every_logger(tmp_path: Path):
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")]
    probe = LoraProbe(every_n_steps=1, verbose=False)
    fit(Task(peft_llama()), probe, token_batches(6), logger=loggers, log_every_n_steps=1, gradient_clip_val=1e-3)
    by_csv, by_board = logged_csv(Path(loggers[0].log_dir)), logged_tensorboard(Path(loggers[1].log_dir))
    assert sorted(by_csv) == sorted(by_board) == list(range(6))
    for step, row in by_csv.items():
        assert row == pytest.approx(by_board[step], rel=1e-5)
        assert row.keys() - STEP_RESPONSE == NAMES
        assert row["lora_probe/healthy"] == 1.0
        assert row["lora_probe/identity/optimizer_coverage"] == 1.0
        assert row["lora_probe/gradient/norm_B"] <= 1.001e-3, "as the optimizer receives them: after clipping"
    assert by_csv[0]["lora_probe/gradient/norm_A"] == 0.0
    assert by_csv[1]["lora_probe/gradient/norm_A"] > 0.0


def test_number_of_metrics_does_not_depend_on_the_model():
    reports = []
    for layers in (1, 4):
        probe = LoraProbe(every_n_steps=1, verbose=False)
        fit(Task(peft_llama(llama(layers))), probe, token_batches(3))
        reports.append(probe.report.metrics.keys())
    assert set(reports[0]) == set(reports[1]) == NAMES | STEP_RESPONSE


def test_rows_wait_for_lightnings_logging_cadence(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    fit(
        Task(peft_llama()),
        LoraProbe(every_n_steps=1, verbose=False),
        token_batches(10),
        logger=logger,
        log_every_n_steps=5,
    )
    rows = logged_csv(Path(logger.log_dir))
    assert sorted(rows) == list(range(10))
    assert all(row.keys() - STEP_RESPONSE == NAMES for row in rows.values())
    assert [step for step, row in rows.items() if row.keys() >= STEP_RESPONSE] == [0], "measured rarely"


def test_metrics_of_a_run_that_the_probe_stopped(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    with pytest.raises(LoraProbeError):
        fit(
            Task(checkpointed(), merges_at(3)),
            LoraProbe(every_n_steps=1, verbose=False),
            logger=logger,
            log_every_n_steps=5,
        )
    rows = logged_csv(Path(logger.log_dir))
    assert [rows[step]["lora_probe/healthy"] for step in sorted(rows)] == [1.0, 1.0, 1.0, 0.0]


def test_progress_bar():
    probe = LoraProbe(verbose=False)
    trainer = fit(Task(peft_llama()), probe, token_batches(5))
    assert trainer.progress_bar_metrics["lora_probe/healthy"] == 1.0


def test_progress_bar_keeps_what_is_logged_once_an_epoch():
    class Counting(Task):
        def log(self, name: str, *args: Any, **kwargs: Any) -> None:
            logged.append(name)
            shown.append(self.trainer.progress_bar_metrics.get("lora_probe/healthy"))
            super().log(name, *args, **kwargs)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            shown.append(self.trainer.progress_bar_metrics.get("lora_probe/healthy"))

    logged: list[str] = []
    shown: list[float | None] = []
    trainer = fit(Counting(peft_llama()), LoraProbe(every_n_steps=1, verbose=False), token_batches(5), max_epochs=2)
    assert trainer.global_step == 10
    assert logged.count("lora_probe/healthy") == 2
    assert set(shown[2:]) == {1.0}
    assert trainer.progress_bar_metrics["lora_probe/healthy"] == 1.0


def test_progress_bar_of_an_unhealthy_run():
    probe = LoraProbe(every_n_steps=1, verbose=False, on_failure="stop")
    trainer = fit(Task(checkpointed(), merges_at(2)), probe, token_batches(5))
    assert trainer.progress_bar_metrics["lora_probe/healthy"] == 0.0


# --- printing ------------------------------------------------------------------------------------


def test_quiet(capsys: pytest.CaptureFixture[str]):
    fit(Task(peft_llama()), LoraProbe(verbose=False), token_batches(5))
    with pytest.raises(LoraProbeError):
        fit(Task(checkpointed(), merges_at(0)), LoraProbe(verbose=False), token_batches(5))
    told = capsys.readouterr()
    assert "lora" not in (told.out + told.err).lower()


def test_table_is_printed_once(capsys: pytest.CaptureFixture[str]):
    fit(Task(peft_llama()), LoraProbe(), token_batches(5), max_epochs=2)
    told = capsys.readouterr().err
    assert told.count("LoRA probe: healthy") == 1
    assert "LP103" not in told, "the long table is asked for"


def test_healthy_run_prints_twelve_lines_at_most_and_all_checks_on_request(capsys: pytest.CaptureFixture[str]):
    fit(Task(peft_llama()), LoraProbe(), token_batches(5))
    assert len(capsys.readouterr().err.strip().splitlines()) <= 12
    fit(Task(peft_llama()), LoraProbe(verbose=2), token_batches(5))
    assert capsys.readouterr().err.count("LP103") == 1


def test_finding_is_printed_when_it_happens_and_in_the_table(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(LoraProbeError, match="unmerge_adapter"):
        fit(Task(checkpointed(), merges_at(2)), LoraProbe(), token_batches(5))
    told = capsys.readouterr().err
    assert told.count("LoRA probe: UNHEALTHY") == 1
    assert "merged-adapter" in told.split("LoRA probe: UNHEALTHY")[1], "the finding stands last"


# --- select, ignore and the single-purpose callbacks ---------------------------------------------


def codes(probe: LoraProbe) -> set[str]:
    return {f.code for f in probe.report.findings}


def test_select_and_ignore():
    probe = LoraProbe(verbose=False, select=["LP1", "LP201"], ignore=["LP107"])
    fit(Task(peft_llama()), probe, token_batches(5))
    of_activation = {"LP101", "LP102", "LP103", "LP104", "LP105", "LP106", "LP108", "LP109", "LP110", "LP111"}
    assert codes(probe) == of_activation | {"LP201"}


def test_ignored_fault_does_not_stop_the_run():
    probe = LoraProbe(verbose=False, select=["LP103"], ignore=["LP103"])
    fit(Task(checkpointed(), merges_at(2)), probe, token_batches(5))
    assert probe.report.healthy is None


@pytest.mark.parametrize(
    ("callback", "family"),
    [(AdapterActivationCallback, "LP1"), (WrapperIdentityCallback, "LP2"), (GradientReachabilityCallback, "LP3")],
)
def test_single_purpose_callback(callback, family):
    probe = callback(verbose=False)
    fit(Task(peft_llama()), probe, token_batches(5))
    assert codes(probe) == {check.code for check in catalogue.all_checks() if check.code.startswith(family)}
    assert {f.code for f in probe.report.with_status("pass")} >= {code for code in CORE if code.startswith(family)}
    with pytest.warns(UserWarning, match="use LoraProbe"):
        callback(select=["LP4"])


def test_all_three_together():
    probes = [
        AdapterActivationCallback(verbose=False),
        WrapperIdentityCallback(verbose=False),
        GradientReachabilityCallback(verbose=False),
    ]
    fit(Task(peft_llama()), None, token_batches(5), callbacks=probes)
    assert all(probe.report.healthy for probe in probes)


# --- policies ------------------------------------------------------------------------------------


def test_stop_ends_training_gracefully():
    class Sees(pl.Callback):
        ended = False

        def on_train_end(self, *args: object) -> None:
            self.ended = True

    probe, sees = LoraProbe(verbose=False, on_failure="stop"), Sees()
    trainer = fit(Task(checkpointed(), merges_at(2)), probe, callbacks=[sees])
    assert trainer.global_step == 3
    assert sees.ended
    assert [f.code for f in probe.report.failures] == ["LP103"]


def test_warn_goes_on():
    probe = LoraProbe(verbose=False, on_failure="warn", every_n_steps=1)
    with pytest.warns(LoraProbeWarning, match="LP103") as caught:
        trainer = fit(Task(checkpointed(), merges_at(2)), probe)
    assert trainer.global_step == 20
    assert len([w for w in caught if w.category is LoraProbeWarning]) == 1, "one fault, one warning"
    (finding,) = probe.report.failures
    assert (finding.step, finding.last_step, finding.count) == (2, 19, 18)


def test_fault_that_has_passed_stays_in_the_report():
    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        if index == 2:
            task.model.merge_adapter()
        if index == 4:
            task.model.unmerge_adapter()
        return language_loss(task, ids, index)

    probe = LoraProbe(verbose=False, on_failure="warn", every_n_steps=1)
    with pytest.warns(LoraProbeWarning, match="LP103"):
        fit(Task(checkpointed(), step), probe)
    (finding,) = probe.report.failures
    assert (finding.code, finding.step, finding.last_step, finding.count) == ("LP103", 2, 3, 2)
    assert probe.report.healthy is False


def test_raise_comes_before_the_update():
    task = Task(checkpointed(), merges_at(2))
    with pytest.raises(LoraProbeError) as error:
        fit(task, LoraProbe(verbose=False))
    assert [f.code for f in error.value.findings] == ["LP103"]
    assert error.value.findings[0].step == 2
    assert task.trainer.global_step == 2


def test_swallowed_error_is_raised_again():
    caught: list[LoraProbeError] = []

    class Swallows(Task):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().optimizer_step(*args, **kwargs)
            except LoraProbeError as error:
                caught.append(error)
                if len(caught) == 2:
                    raise

    with pytest.raises(LoraProbeError, match="LP103"):
        fit(Swallows(checkpointed(), merges_at(2)), LoraProbe(verbose=False))
    assert caught[0] is not caught[1]
    assert caught[0].findings == caught[1].findings


def test_user_exception_carries_the_finding_as_a_note():
    """Merged without checkpointing, backward() is loud, and does not say why."""
    with pytest.raises(RuntimeError, match="does not require grad") as error:
        fit(Task(peft_llama(), merges_at(2)), LoraProbe(verbose=False))
    assert any("LP103" in note for note in error.value.__notes__)


def test_user_exception_of_a_healthy_run_carries_no_note():
    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        if index == 4:
            raise RuntimeError("mine")
        return language_loss(task, ids, index)

    probe = LoraProbe(verbose=False)
    with pytest.raises(RuntimeError, match="mine") as error:
        fit(Task(peft_llama(), step), probe)
    assert not getattr(error.value, "__notes__", [])
    assert probe.report.healthy is True


# --- errors of our own ---------------------------------------------------------------------------


def test_error_inside_a_check_is_kept_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def judge(facts: Facts) -> Any:
        if facts.step == 2:
            raise ZeroDivisionError("inside")
        return catalogue.all_checks()[0].judge(facts)

    broken = dataclasses.replace(catalogue.all_checks()[0], code="LP199", name="broken", judge=judge)
    assert isinstance(broken, Check)
    everything = (*catalogue.all_checks(), broken)
    monkeypatch.setattr(catalogue, "all_checks", lambda: everything)
    record = tmp_path / "record.jsonl"
    probe = LoraProbe(every_n_steps=1, verbose=False, record=record)
    trainer = fit(Task(peft_llama()), probe)
    assert trainer.global_step == 20
    assert len(probe.report.internal_errors) == 1
    errors = [line for line in read_record(record) if line["kind"] == "error"]
    assert len(errors) == 1
    assert "ZeroDivisionError: inside" in errors[0]["traceback"]
    finding = next(f for f in probe.report.findings if f.code == "LP199")
    assert finding.status == "skipped"
    assert finding.message == "could not judge: ZeroDivisionError inside the check (passed up to step 1)"
    others = {f.code for f in probe.report.with_status("pass") if f.last_step >= 18}
    assert others >= CORE


@pytest.mark.parametrize("method", ["note_call", "new_candidate", "finish", "state", "facts"])
def test_error_inside_an_observer_ends_the_probe_and_not_the_run(monkeypatch: pytest.MonkeyPatch, method):
    from lora_probe_callbacks.observe.forward.log import ForwardLog

    works, calls = getattr(ForwardLog, method), []

    def breaks(*args: Any) -> Any:
        calls.append(method)
        if len(calls) > 10:
            raise ZeroDivisionError("inside")
        return works(*args)

    monkeypatch.setattr(ForwardLog, method, breaks)
    probe = LoraProbe(every_n_steps=1, verbose=False)
    task = Task(peft_llama())
    assert fit(task, probe).global_step == 20
    assert len(probe.report.internal_errors) == 1
    assert not probe.report.with_status("fail", "warn", "pass")
    assert probe.report.healthy is None, "what nobody watched is not healthy"
    assert any("could not judge" in f.message for f in probe.report.with_status("skipped"))
    assert not any(m._forward_pre_hooks for m in task.modules())


def test_record_that_cannot_be_written_does_not_end_the_run(tmp_path: Path):
    record = tmp_path / "record.jsonl"

    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        if index == 2:
            record.unlink()
            record.mkdir()
        return language_loss(task, ids, index)

    probe = LoraProbe(every_n_steps=1, verbose=False, record=record)
    assert fit(Task(peft_llama(), step), probe).global_step == 20
    assert probe.report.internal_errors


def test_record_is_strict_json_and_is_continued(tmp_path: Path):
    record = tmp_path / "runs" / "record.jsonl"
    for _ in range(2):
        fit(Task(peft_llama()), LoraProbe(verbose=False, record=record), token_batches(2))
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["kind"] for line in lines if line["kind"] != "decision"] == ["start", "end", "start", "end"]
    assert all(line["schema"] == 1 for line in lines)
