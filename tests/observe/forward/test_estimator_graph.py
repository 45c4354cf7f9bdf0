"""probe.watch: an estimator of the user's own, judged for its order, its object and its gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.facts import bad, facts
from support.facts import reached_estimator as fact
from support.policies import INTENT, E, log_probs, policy
from support.training import Loop, Training, adamw, batches, llama, next_token_loss, trainer
from torch import Tensor, nn

from lora_probe_callbacks import LoraProbe, LoraProbeError, LoraProbeMonitor
from lora_probe_callbacks.estimators import UpdateDirection


class Wrapper(nn.Module):
    """What an algorithm keeps of a policy: a module of its own, made when everything was set up."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(policy)


def gradients(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """mu_Y: what the step will follow."""
    return {p: p.grad.clone() for p in model.parameters() if p.grad is not None}


def run(
    step: Callable[[nn.Module, LoraProbeMonitor, int], None],
    model: nn.Module | None = None,
    steps: int = 6,
    **intent: Any,
) -> tuple[Any, LoraProbeError | None]:
    """Steps of policy training whose middle part is given; returns the report and what ended the run."""
    model = policy() if model is None else model
    optimizer = adamw(model)
    probe = LoraProbeMonitor(model, optimizer, verbose=False, every_n_steps=1, **INTENT, **intent)
    error = None
    try:
        with probe:
            for number in range(steps):
                step(model, probe, number)
                optimizer.step()
                optimizer.zero_grad()
    except LoraProbeError as raised:
        error = raised
    assert not probe.report.internal_errors, probe.report.internal_errors
    return probe.report, error


def found(report: Any) -> list[tuple[str, str, int]]:
    return [(f.code, f.status, f.step) for f in report.with_status("fail", "warn")]


def first_order(model: nn.Module, number: int) -> dict[nn.Parameter, Tensor]:
    """The part of the seed that was right: the adapter active, then the forward, then mu_Y."""
    model.set_adapter("policy")
    next_token_loss(model, batches(6)[number], number).backward()
    return gradients(model)


FIRST_ORDER = {"LP101", "LP102", "LP103", "LP201", "LP202", "LP203", "LP301", "LP302"}


# --- the bug that this project was born from ------------------------------------------------------


@pytest.mark.parametrize("hook", [False, True], ids=["", "input-gradients"])
def test_seed_bug_both_halves(hook: bool) -> None:
    """S before set_adapter and on the wrapper's module, mu_Y on the PEFT module."""
    model = policy()
    if hook:
        model.enable_input_require_grads()
    model.base_model.set_adapter("default", inference_mode=True)
    wrapper = Wrapper(model)
    model.set_adapter("policy")

    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        model.base_model.set_adapter("default", inference_mode=True)
        S = log_probs(wrapper.module, E)
        mu_Y = first_order(model, number)
        probe.watch(S, name="S", direction=mu_Y)

    report, error = run(step, model)
    assert [code for code, _, _ in found(report)] == ["LP205"], found(report)
    assert found(report)[0][2] == 0
    assert error is not None
    assert {f.code for f in report.with_status("pass")} >= FIRST_ORDER


@pytest.mark.parametrize("hook", [False, True], ids=["", "input-gradients"])
def test_seed_bug_before_set_adapter_alone(hook: bool) -> None:
    model = policy()
    if hook:
        model.enable_input_require_grads()

    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        model.base_model.set_adapter("default", inference_mode=True)
        S = log_probs(model, E)
        mu_Y = first_order(model, number)
        probe.watch(S, name="S", direction=mu_Y)

    report, error = run(step, model)
    assert found(report) == [("LP105", "fail", 0)]
    assert error is not None
    assert "at the forward of estimator 'S'" in report.failures[0].message
    assert {f.code for f in report.with_status("pass")} >= FIRST_ORDER


def test_seed_bug_on_the_wrappers_module_alone() -> None:
    model = policy()
    wrapper = Wrapper(model)

    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        S = log_probs(wrapper.module, E)
        probe.watch(S, name="S", direction=first_order(model, number))

    report, error = run(step, model)
    assert found(report) == [("LP205", "fail", 0)]
    assert error is not None
    assert "and to none of its adapter" in report.failures[0].message


def test_without_the_estimator_the_first_order_path_is_healthy() -> None:
    report, error = run(lambda model, probe, number: first_order(model, number) and None)
    assert (found(report), error) == ([], None)


def test_in_order_on_one_object_it_is_healthy() -> None:
    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        mu_Y = first_order(model, number)
        S = log_probs(model.get_base_model(), E)  # LoRA is injected in place: the same tensors
        probe.watch(S, name="S", direction=mu_Y)

    report, error = run(step)
    assert (found(report), error) == ([], None)
    assert {"LP204", "LP205", "LP304", "LP306"} <= {f.code for f in report.with_status("pass")}


def test_wrapper_whose_module_is_the_very_object_is_healthy() -> None:
    """As DistributedDataParallel's .module is."""

    class Around(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        mu_Y = first_order(model, number)
        probe.watch(log_probs(Around(model).module, E), name="S", direction=mu_Y)

    report, error = run(step)
    assert (found(report), error) == ([], None)


def test_seed_bug_on_a_base_from_before_the_adapter() -> None:
    """It holds no adapter at all: no gradient of S leads to the one that trains."""
    base = llama()

    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        S = log_probs(base, E)
        probe.watch(S, name="S", direction=first_order(model, number))

    report, error = run(step)
    # Whether it says "elsewhere" depends on whether models with adapters are alive elsewhere in this process.
    assert found(report) in ([("LP304", "fail", 0)], [("LP205", "fail", 0)])
    assert error is not None
    assert {f.code for f in report.with_status("pass")} >= FIRST_ORDER


# --- directions ---------------------------------------------------------------------------------


def by_parameter(model: nn.Module) -> Any:
    return gradients(model)


def by_id(model: nn.Module) -> Any:
    return {id(p): g for p, g in gradients(model).items()}


def by_name(model: nn.Module) -> Any:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def by_name_from_another_root(model: nn.Module) -> Any:
    return {f"algorithm.policy.{n}": g for n, g in by_name(model).items()}


def as_direction(model: nn.Module) -> Any:
    return UpdateDirection.from_gradients(model, lr=1e-3)


@pytest.mark.parametrize("made", [by_parameter, by_id, by_name, by_name_from_another_root, as_direction])
def test_direction_of_any_kind_is_understood(made: Callable[[nn.Module], Any]) -> None:
    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        first_order(model, number)
        probe.watch(log_probs(model, E), name="S", direction=made(model))

    report, _ = run(step)
    assert not found(report)
    assert "LP204" in {f.code for f in report.with_status("pass")}


@pytest.mark.parametrize("made", [by_parameter, by_id, as_direction])
def test_direction_on_a_copy_fails(made: Callable[[nn.Module], Any]) -> None:
    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        first_order(model, number)
        other = copy.deepcopy(model)
        next_token_loss(other, E, 0).backward()
        probe.watch(log_probs(model, E), name="S", direction=made(other))

    report, error = run(step)
    assert found(report) == [("LP204", "fail", 0)]
    assert error is not None


def test_direction_by_names_that_do_not_exist_fails() -> None:
    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        first_order(model, number)
        probe.watch(log_probs(model, E), direction={"lm_head.lora_A": torch.ones(1)})

    assert found(run(step)[0]) == [("LP204", "fail", 0)]


def test_direction_that_leaves_out_a_part_warns() -> None:
    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        mu_Y = first_order(model, number)
        probe.watch(log_probs(model, E), direction=dict(list(mu_Y.items())[1:]))

    report, error = run(step)
    assert [(code, status) for code, status, _ in found(report)] == [("LP204", "warn")]
    assert error is None


# --- graphs and gradients ------------------------------------------------------------------------


def watching(make: Callable[[nn.Module], Any]) -> list[tuple[str, str, int]]:
    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        mu_Y = first_order(model, number)
        probe.watch(make(model), name="S", direction=mu_Y)

    return found(run(step)[0])


def test_detached_fails() -> None:
    assert watching(lambda model: log_probs(model, E).detach()) == [("LP304", "fail", 0)]


def test_without_gradients_fails() -> None:
    assert watching(torch.no_grad()(lambda model: log_probs(model, E))) == [("LP306", "fail", 0)]


def test_under_inference_mode_fails() -> None:
    assert watching(torch.inference_mode()(lambda model: log_probs(model, E))) == [("LP306", "fail", 0)]


def test_merged_in_the_estimators_forward_alone_fails() -> None:
    def merged(model: Any) -> Tensor:
        model.enable_input_require_grads()
        model.merge_adapter()
        S = log_probs(model, E)
        model.unmerge_adapter()
        return S

    assert [code for code, _, _ in watching(merged)] == ["LP103"]


def test_gradients_of_the_estimators_loss() -> None:
    def taken(model: nn.Module, of: str) -> dict[nn.Parameter, Tensor | None]:
        tensors = [p for n, p in model.named_parameters() if ".policy." in n]
        loss = log_probs(model, E).sum()
        found = torch.autograd.grad(loss, tensors, allow_unused=True)
        return {p: None if of == "none" else 0 * g if of == "zero" else g for p, g in zip(tensors, found, strict=True)}

    assert watching(lambda model: taken(model, "right")) == []
    assert watching(lambda model: taken(model, "none")) == [("LP305", "fail", 0)]
    assert watching(lambda model: taken(model, "zero")) == [("LP305", "fail", 3)]


def test_reentrant_checkpoint_hides_the_graph_and_is_left_to_the_gradients() -> None:
    model = policy()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()

    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        first_order(model, number)
        probe.watch(log_probs(model, E))

    report, _ = run(step, model)
    assert not found(report)
    finding = next(f for f in report.findings if f.code == "LP304")
    assert (finding.status, "gradients decide" in finding.message) == ("pending", True)


def test_one_look_between_two_probed_steps_is_judged() -> None:
    model = policy()
    wrapper = Wrapper(model)
    optimizer = adamw(model)
    probe = LoraProbeMonitor(model, optimizer, verbose=False, on_failure="stop", every_n_steps=100, **INTENT)
    with probe:
        for number in range(6):
            first_order(model, number)
            if number == 5:
                probe.watch(log_probs(wrapper.module, E))
            optimizer.step()
            optimizer.zero_grad()
    assert found(probe.report) == [("LP205", "fail", 5)]


def test_nothing_of_what_was_watched_is_kept() -> None:
    import weakref

    kept: list[weakref.ref[Tensor]] = []

    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        mu_Y = first_order(model, number)
        S = log_probs(model, E)
        kept.append(weakref.ref(S))
        probe.watch(S, direction=mu_Y)
        del S
        assert kept[-1]() is None

    assert not found(run(step)[0])


def test_lightning_door_has_it_too() -> None:
    probe = LoraProbe(verbose=False, on_failure="stop", every_n_steps=1, **INTENT)
    model = policy()
    other = copy.deepcopy(model)

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        probe.watch(log_probs(other, E), name="S")
        return next_token_loss(model, batch, step)

    from torch.utils.data import DataLoader

    trainer(probe, 3).fit(Loop(Training(model, loss)), DataLoader(batches(3), batch_size=None))
    assert found(probe.report) == [("LP205", "fail", 0)]


def test_watch_outside_of_a_run_says_nothing() -> None:
    model = policy()
    probe = LoraProbeMonitor(model, adamw(model), verbose=False, **INTENT)
    probe.watch(log_probs(model, E))
    assert not probe.report.findings
    LoraProbe().watch(log_probs(model, E))


def test_something_that_is_no_direction_becomes_could_not_judge() -> None:
    def step(model: nn.Module, probe: LoraProbeMonitor, number: int) -> None:
        first_order(model, number)
        probe.watch(log_probs(model, E), direction=torch.ones(3))

    model = policy()
    optimizer = adamw(model)
    probe = LoraProbeMonitor(model, optimizer, verbose=False, **INTENT)
    with probe:
        step(model, probe, 0)
        optimizer.step()
    assert not found(probe.report)
    finding = next(f for f in probe.report.findings if f.code == "LP204")
    assert "expected an UpdateDirection or a mapping" in finding.message


# --- verdicts -----------------------------------------------------------------------------------

ALL = frozenset(range(4))


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, []),
        ({"reached": frozenset(), "foreign": 4, "forwards": ()}, ["LP205"]),
        ({"reached": frozenset()}, ["LP304"]),
        ({"graph": False, "reached": frozenset(), "forwards": (), "without_grad": 1}, ["LP306"]),
        (
            {"graph": False, "reached": frozenset(), "forwards": (), "elsewhere": ("another model's 2 layers",)},
            ["LP205"],
        ),
        ({"reached": frozenset({0, 1})}, ["LP304"]),
        ({"direction": frozenset(), "direction_foreign": ("A",)}, ["LP204"]),
        (
            {
                "direction": frozenset(),
                "direction_foreign": ("A",),
                "reached": frozenset(),
                "foreign": 4,
                "forwards": (),
            },
            ["LP205"],
        ),
        ({"missing": ALL}, ["LP305"]),
        ({"missing": ALL, "reached": frozenset()}, ["LP304"]),
        ({"missing": frozenset({0}), "zero": 3}, []),
        ({"missing": frozenset(), "zero": 4}, ["LP305"]),
        ({"graph": None, "reached": None, "why_not": "could not judge: it failed"}, []),
    ],
)
def test_one_fault_gives_one_finding(changes: dict[str, Any], codes: list[str]) -> None:
    assert list(bad(facts(estimators=(fact(**changes),)))) == codes


def test_fault_of_the_training_forward_comes_first() -> None:
    merged = facts(modes=("merged", "merged"))
    estimator = fact(forwards=merged.forwards, modes=merged.modes, reached=frozenset())
    verdicts = bad(facts(modes=("merged", "merged"), estimators=(estimator,)))
    assert list(verdicts) == ["LP103"]
    assert "estimator" not in verdicts["LP103"].message
