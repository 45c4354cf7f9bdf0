"""However a run ends, nothing of the probe is left behind, and the next run works."""

from __future__ import annotations

import copy
import io
import pickle
import signal
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.tiny import Task, adamw, fit, language_loss, llama, peft_llama, token_batches
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from lora_probe_callbacks import LoraProbe, LoraProbeError, LoraProbeWarning

BAD_STEP = 2


class TroubleError(Exception):
    """What the user's own code raises."""


def hooks(task: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[str, int]]:
    """Everything that can hang on modules, tensors and optimizers, with the number of entries."""
    for name, module in task.named_modules():
        for kind, value in vars(module).items():
            if kind.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                yield f"{name}.{kind}", len(value)
    for name, tensor in task.named_parameters():
        yield f"{name} backward", len(tensor._backward_hooks or ())
        yield f"{name} accumulate", len(getattr(tensor, "_post_accumulate_grad_hooks", None) or ())
    for index, optimizer in enumerate(optimizers):
        yield f"optimizer {index} before", len(optimizer._optimizer_step_pre_hooks)
        yield f"optimizer {index} after", len(optimizer._optimizer_step_post_hooks)


class Watched(Task):
    """Keeps its optimizer and the outputs of its forwards, to look for what hangs on them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.outputs: list[torch.Tensor] = []
        self.trouble = True

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizer = self.make_optimizers(self)
        return self.optimizer


def checkpointed() -> nn.Module:
    """With the input-gradient hook a disabled or merged adapter does not make backward() fail."""
    base = llama()
    base.enable_input_require_grads()
    return peft_llama(base)


def assert_no_trace(task: Watched, before: dict[str, int]) -> None:
    after = dict(hooks(task, [task.optimizer]))
    assert {name: (before.get(name, 0), n) for name, n in after.items() if before.get(name, 0) != n} == {}
    assert all(not output._backward_hooks for output in task.outputs)
    assert _get_current_function_mode_stack() == []


def run_twice(
    task: Watched, error: type[BaseException] | None, *, probe: LoraProbe | None = None, **trainer: Any
) -> LoraProbe:
    """Fit until ``error``, look for traces, and fit again without the trouble."""
    probe = LoraProbe(every_n_steps=1, verbose=False) if probe is None else probe
    before = dict(hooks(task, []))
    if error is None:
        fit(task, probe, token_batches(6), **trainer)
    else:
        with pytest.raises(error):
            fit(task, probe, token_batches(6), **trainer)
    assert task.outputs or error is LoraProbeError
    assert_no_trace(task, before)
    first = probe.report

    task.trouble = False
    task.outputs.clear()
    fit(task, probe, token_batches(6))
    assert_no_trace(task, before)
    assert probe.report is not first
    assert probe.report.healthy is True
    return probe


def at_bad_step(action: Callable[[Task], None]) -> Callable[[Task, torch.Tensor, int], torch.Tensor]:
    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        if task.trouble and index == BAD_STEP:
            action(task)
        return language_loss(task, ids, index)

    return step


def test_fit_ends():
    task = Watched(checkpointed())
    assert task.model.base_model.model.model.embed_tokens._forward_hooks, (
        "a hook of the user's must be there to survive"
    )
    run_twice(task, None)


def raises(*args: object, **kwargs: object) -> None:
    raise TroubleError


@pytest.mark.parametrize("where", ["training_step", "outermost forward", "layer forward", "backward"])
def test_user_code_fails(where):
    def fail(task: Task) -> None:
        if where == "training_step":
            raise TroubleError
        layer = task.model.base_model.model.model.layers[1].self_attn.q_proj
        module = task.model if where == "outermost forward" else layer
        if where == "backward":
            handle = module.register_forward_hook(lambda m, a, out: out.register_hook(raises) and None)
        else:
            handle = module.register_forward_pre_hook(raises)
        task.mine = handle

    class Own(Watched):
        def on_exception(self, *args: object) -> None: ...

    task = Own(checkpointed(), at_bad_step(fail))

    class RemoveMine(pl.Callback):
        def on_exception(self, trainer: pl.Trainer, module: Task, exception: BaseException) -> None:
            if where != "training_step":
                module.mine.remove()

    run_twice(task, TroubleError, callbacks=[RemoveMine()])


def test_optimizer_fails():
    class Breaks(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            result = super().step(closure)
            if self.steps == BAD_STEP and task.trouble:
                raise TroubleError
            return result

    make = lambda task: Breaks([p for p in task.parameters() if p.requires_grad], lr=0.1)  # noqa: E731
    task = Watched(checkpointed(), optimizers=make)
    run_twice(task, TroubleError)


@pytest.mark.parametrize(
    "event", ["on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end"]
)
@pytest.mark.parametrize("first", [True, False])
def test_another_callback_fails(event, first):
    class Fails(pl.Callback):
        calls = 0

    def fail(self: Fails, *args: object) -> None:
        self.calls += 1
        if self.calls == BAD_STEP + 1:
            raise TroubleError

    setattr(Fails, event, fail)
    task, probe, before = Watched(checkpointed()), LoraProbe(every_n_steps=1, verbose=False), {}
    before = dict(hooks(task, []))
    callbacks = [Fails(), probe] if first else [probe, Fails()]
    with pytest.raises(TroubleError):
        fit(task, None, token_batches(6), callbacks=callbacks)
    assert_no_trace(task, before)
    fit(task, probe, token_batches(6))
    assert_no_trace(task, before)
    assert probe.report.healthy is True


@pytest.mark.parametrize("fault", ["from the start", "later", "seen after the step"])
def test_probe_raises(fault):
    def act(task: Task) -> None:
        if fault == "later":
            task.model.merge_adapter()
        elif fault == "seen after the step":
            for group in task.optimizer.param_groups:
                group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]

    class Mends(pl.Callback):
        def on_exception(self, trainer: pl.Trainer, task: Task, exception: BaseException) -> None:
            if fault == "later":
                task.model.unmerge_adapter()
            task.model.enable_adapter_layers()

    class Breaks(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, task: Task) -> None:
            if task.trouble and fault == "from the start":
                task.model.disable_adapter_layers()

    task = Watched(checkpointed(), at_bad_step(act))
    run_twice(task, LoraProbeError, callbacks=[Mends(), Breaks()])


@pytest.mark.parametrize("where", ["training_step", "forward"])
def test_interrupt(where):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    def act(task: Task) -> None:
        if where == "training_step":
            interrupt()
        layer = task.model.base_model.model.model.layers[1].self_attn.q_proj
        task.mine = layer.register_forward_pre_hook(interrupt)

    class RemoveMine(pl.Callback):
        def on_exception(self, trainer: pl.Trainer, module: Task, exception: BaseException) -> None:
            if where == "forward":
                module.mine.remove()

    handler = signal.getsignal(signal.SIGINT)
    try:
        run_twice(Watched(checkpointed(), at_bad_step(act)), SystemExit, callbacks=[RemoveMine()])
    finally:
        signal.signal(signal.SIGINT, handler)


def test_interrupt_in_the_forward_leaves_the_next_forward_alone():
    """A notebook user interrupts, and goes on with the model: no hook may run."""
    calls: list[object] = []
    task = Watched(checkpointed())
    handler = signal.getsignal(signal.SIGINT)

    class Interrupts(nn.Module):
        def forward(self, *args: object) -> None:
            raise KeyboardInterrupt

    task.step = lambda task, ids, index: Interrupts()() if index == 1 else language_loss(task, ids, index)
    try:
        with pytest.raises(SystemExit):
            fit(task, LoraProbe(verbose=False), token_batches(3))
    finally:
        signal.signal(signal.SIGINT, handler)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: calls.extend(module._forward_hooks)
    )
    try:
        task.model(input_ids=torch.ones(1, 4, dtype=torch.long))
    finally:
        handle.remove()
    embedding = task.model.base_model.model.model.embed_tokens
    assert calls == list(embedding._forward_hooks)


def test_graceful_stop():
    def act(task: Task) -> None:
        task.model.merge_adapter()

    task, probe = (
        Watched(checkpointed(), at_bad_step(act)),
        LoraProbe(every_n_steps=1, verbose=False, on_failure="stop"),
    )
    before = dict(hooks(task, []))
    trainer = fit(task, probe, token_batches(6))
    assert_no_trace(task, before)
    assert trainer.global_step == BAD_STEP + 1
    assert [f.code for f in probe.report.failures] == ["LP103"]
    task.model.unmerge_adapter()
    task.trouble = False
    assert fit(task, probe, token_batches(6)).global_step == 6
    assert probe.report.healthy is True


def test_warn():
    def act(task: Task) -> None:
        task.model.merge_adapter()

    task, probe = (
        Watched(checkpointed(), at_bad_step(act)),
        LoraProbe(every_n_steps=1, verbose=False, on_failure="warn"),
    )
    before = dict(hooks(task, []))
    with pytest.warns(LoraProbeWarning, match="LP103"):
        trainer = fit(task, probe, token_batches(6))
    assert_no_trace(task, before)
    assert trainer.global_step == 6
    assert [f.code for f in probe.report.failures] == ["LP103"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copy_of_a_probed_model_carries_no_probe(how):
    def duplicate(module: nn.Module) -> nn.Module:
        if how == "deepcopy":
            return copy.deepcopy(module)
        if how == "pickle":
            return pickle.loads(pickle.dumps(module))
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    copies: list[nn.Module] = []

    def act(task: Task) -> None:
        copies.append(duplicate(task.model))

    task, probe = Watched(peft_llama(), at_bad_step(act)), LoraProbe(every_n_steps=1, verbose=False)
    fit(task, probe, token_batches(6))
    assert probe.report.healthy is True
    ids = torch.ones(1, 4, dtype=torch.long)
    held = [hook for m in copies[0].modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert held, "the copy must have been made while the hooks were there"
    assert all(hook(None, None) is None and not hasattr(hook, "__self__") for hook in held)
    assert copies[0](input_ids=ids).logits.shape == (1, 4, 32)
    # And a copy of the copy, with what was left in it.
    assert copy.deepcopy(copies[0])(input_ids=ids).logits.shape == (1, 4, 32)


def test_output_of_a_probed_forward_can_be_saved():
    saved: list[bytes] = []

    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        out = task.model(input_ids=ids, labels=ids)
        file = io.BytesIO()
        torch.save(out.logits, file)
        saved.append(file.getvalue())
        return out.loss

    fit(Watched(peft_llama(), step), LoraProbe(every_n_steps=1, verbose=False), token_batches(2))
    assert len(saved) == 2


def test_optimizer_of_a_probed_run_can_be_copied():
    def act(task: Task) -> None:
        task.aside = copy.deepcopy(task.optimizer)

    task = Watched(peft_llama(), at_bad_step(act), optimizers=adamw)
    fit(task, LoraProbe(every_n_steps=1, verbose=False), token_batches(6))
    assert not getattr(task.aside, "_optimizer_step_pre_hooks", None)
