"""The same training under each front door: Lightning, a plain loop, and the Transformers Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from support.training import Training, Watched, batches, fit_lightning, left_by_the_probe
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_probe_callbacks import LoraProbe, LoraProbeMonitor, LoraProbeTrainerCallback

STEPS = 8


def autocast(precision: str) -> AbstractContextManager[Any]:
    """What Lightning's word for a precision stands for around a forward."""
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return torch.autocast("cpu", dtypes[precision]) if precision in dtypes else nullcontext()


def new_scaler(run: Training) -> torch.amp.GradScaler | None:
    return torch.amp.GradScaler("cpu") if run.precision == "16-mixed" else None


# --- a plain loop -------------------------------------------------------------------------------


def fit_plain(
    run: Training, probe: AbstractContextManager[Any], steps: int, scaler: torch.amp.GradScaler | None = None
) -> None:
    """The loop that everybody writes, inside the context of a monitor (or of nothing)."""
    optimizer = run.built_optimizer()
    scheduler = None if run.scheduler is None else run.scheduler(optimizer)
    run.model.train()
    with run.around(), probe:
        for number, batch in enumerate(batches(steps * run.accumulate)):
            run.between_steps(run, number)
            with autocast(run.precision):
                loss = run.loss(run.model, batch, number) / run.accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
            if (number + 1) % run.accumulate:
                continue
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=run.set_to_none)
            if scheduler is not None:
                scheduler.step()


# --- the Transformers Trainer -------------------------------------------------------------------


class RunTrainer(Trainer):
    """A Trainer whose loss and optimizer are those of a run. Everything else is the Trainer's own."""

    def __init__(self, run: Training, folder: str, steps: int, callbacks: list[TrainerCallback], **options: Any):
        self.run = run
        optimizer = run.built_optimizer()
        schedule = run.scheduler(optimizer) if run.scheduler else ConstantLR(optimizer, factor=1.0)
        super().__init__(
            model=run.model,
            args=arguments(folder, steps, accumulate=run.accumulate, **options),
            optimizers=(optimizer, schedule),
            callbacks=callbacks,
        )
        self.number = 0
        scaler = new_scaler(run)
        if scaler is not None:  # Accelerate makes one for a GPU only
            self.accelerator.scaler = scaler

    def get_train_dataloader(self) -> DataLoader:
        rows = [{"ids": b} for b in batches(self.args.max_steps * self.run.accumulate)]
        return DataLoader(rows, batch_size=1, collate_fn=lambda one: one[0])

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.run.between_steps(self.run, self.number)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        number, self.number = self.number, self.number + 1
        with autocast(self.run.precision):
            return self.run.loss(model, inputs["ids"], number)

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        return 0


def arguments(folder: str, steps: int, accumulate: int = 1, **options: Any) -> TrainingArguments:
    """Of a Trainer that writes nothing but what a test asks for."""
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    return TrainingArguments(
        **{
            "output_dir": folder,
            "max_steps": steps,
            "use_cpu": True,
            "gradient_accumulation_steps": accumulate,
            "max_grad_norm": 0.0,
            "dataloader_pin_memory": False,
            **quiet,
            **options,
        }
    )


def fit_trainer(run: Training, probe: LoraProbeTrainerCallback | None, steps: int, **options: Any) -> RunTrainer:
    with tempfile.TemporaryDirectory() as folder:
        trainer = RunTrainer(run, folder, steps, [] if probe is None else [probe], **options)
        with run.around():
            trainer.train()
        return trainer


# --- any door -----------------------------------------------------------------------------------


def _lightning(run: Training, steps: int, **intent: Any) -> tuple[Any, Callable[[], None]]:
    probe = LoraProbe(**intent)
    return probe, lambda: fit_lightning(run, probe, steps)


def _plain(run: Training, steps: int, **intent: Any) -> tuple[Any, Callable[[], None]]:
    scaler = new_scaler(run)
    probe = LoraProbeMonitor(run.model, run.built_optimizer(), scaler=scaler, **intent)
    return probe, lambda: fit_plain(run, probe, steps, scaler)


def _trainer(run: Training, steps: int, **intent: Any) -> tuple[Any, Callable[[], None]]:
    probe = LoraProbeTrainerCallback(**intent)
    return probe, lambda: fit_trainer(run, probe, steps) and None


DOORS = {"lightning": _lightning, "plain": _plain, "trainer": _trainer}


def watch_through(door: str, run: Training, steps: int = STEPS, **intent: Any) -> Watched:
    """Train behind a door with a probe, and take hold of whatever ends the run."""
    probe, fit = DOORS[door](run, steps, **{"verbose": False, **intent})
    error: BaseException | None = None
    try:
        fit()
    except Exception as raised:
        error = raised
    assert not left_by_the_probe(run.model), "hooks of the probe are left on the model"
    assert not probe.report.internal_errors, "\n".join(probe.report.internal_errors)
    return Watched(probe.report, error)
