"""What the probe takes, in counts: they hold on a noisy machine, where seconds do not."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.tiny import llama, peft_llama
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from lora_probe_callbacks import LoraProbeMonitor
from lora_probe_callbacks.observe.device.transfer import Readout
from lora_probe_callbacks.observe.forward.hooks import ForwardObserver
from lora_probe_callbacks.observe.forward.replay import KeptForward

REPEATS = ("LP405", "LP307")


class Operations(TorchDispatchMode):
    """Counts what reaches torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Loop:
    def __init__(self, layers: int = 2, batch: int = 2, **optimizer: Any) -> None:
        torch.manual_seed(0)
        self.model = peft_llama(llama(layers=layers))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.tensors = len(trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, **optimizer)
        self.ids = torch.randint(1, 32, (batch, 8))
        self.penalty = 0.0  # on the weights: no output of the model shows it

    def step(self) -> Counter[str]:
        with Operations() as operations:
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
            if self.penalty:
                loss = loss + self.penalty * sum(p.square().sum() for p in self.optimizer.param_groups[0]["params"])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return operations.seen

    def probe(self, every_n_steps: int) -> LoraProbeMonitor:
        return LoraProbeMonitor(self.model, self.optimizer, every_n_steps=every_n_steps, ignore=REPEATS, verbose=False)

    def hooks(self) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules())

    def extra(self) -> Counter[str]:
        """Operations of a probed step that a plain one has not."""
        for _ in range(3):
            self.step()
        plain = self.step()
        with self.probe(1) as probe:
            for _ in range(5):
                self.step()
            probed = self.step()
        assert probe.report.healthy
        return probed - plain


def test_between_probed_steps_there_is_nothing():
    loop = Loop()
    before = loop.hooks()
    for _ in range(3):
        plain = loop.step()
    with loop.probe(10**6) as probe:
        for _ in range(5):
            loop.step()
        assert loop.hooks() == before
        assert loop.step() == plain
    assert probe.report.judged_steps == 4


def test_probed_steps_set_off_no_collection_of_their_own():
    """Objects made for every tensor at every decision would, and every hundredth one goes through the whole process."""
    loop = Loop(layers=12)
    loop.step()
    before, started = gc.get_threshold(), []

    def collections(steps: int) -> int:
        gc.collect()
        started.clear()
        for _ in range(steps):
            loop.step()
        return len(started)

    def count(phase: str, info: dict[str, int]) -> None:
        started.extend([info["generation"]] * (phase == "start"))

    # As many as are alive at the end of a plain backward: a gradient is an object of Python's once it was asked for.
    gc.set_threshold(2 * loop.tensors, 10, 10)
    gc.callbacks.append(count)
    try:
        plain = collections(10)
        with loop.probe(1) as probe:
            for _ in range(5):
                loop.step()
            probed = collections(10)
    finally:
        gc.callbacks.remove(count)
        gc.set_threshold(*before)
    assert probe.report.healthy
    assert gc.isenabled()
    assert probed <= plain + 13  # one a step: gradients are asked for at the end of the backward already


def test_probed_step_reads_every_tensor_in_few_operations():
    loop = Loop()
    shapes = {p.shape for group in loop.optimizer.param_groups for p in group["params"]}
    extra = loop.extra()
    # Norms: of the gradients; of the tensors before and after the update and of the change, once for each shape; and of
    # the changes of the sampled base weights, of two shapes.
    assert extra["linalg_vector_norm"] + extra["_foreach_norm"] == 4 * len(shapes) + 2
    assert extra["ne_"] == len(shapes)  # elements that moved
    assert extra["sum"] == len(shapes) + 1  # and the supervised tokens of each row
    assert Loop(layers=4).extra()["linalg_vector_norm"] == extra["linalg_vector_norm"]
    assert extra["_foreach_sub_"] == 1
    assert not extra["_local_scalar_dense"], "a value was fetched by itself"
    assert sum(extra.values()) < 200


def test_a_decision_is_one_transfer(monkeypatch: pytest.MonkeyPatch):
    fetched = []
    works = Readout.receive
    monkeypatch.setattr(Readout, "receive", lambda self: (fetched.append(1), works(self))[1])
    loop = Loop()
    with loop.probe(1):
        loop.step()
        first = len(fetched)
        for _ in range(4):
            loop.step()
        assert len(fetched) == first + 4


class Forwards:
    """How often a step runs the training forward again for LP307, and what of them is with gradients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[bool] = []
        works = KeptForward.call
        monkeypatch.setattr(
            KeptForward, "call", lambda kept: (self.seen.append(torch.is_grad_enabled()), works(kept))[1]
        )

    def of(self, loop: Loop, steps: int, every_n_steps: int = 1) -> list[tuple[int, int]]:
        taken = []
        with LoraProbeMonitor(
            loop.model,
            loop.optimizer,
            every_n_steps=every_n_steps,
            on_failure="stop",
            select=["LP307"],
            verbose=False,
        ):
            for _ in range(steps):
                self.seen.clear()
                loop.step()
                taken.append((len(self.seen), sum(self.seen)))
        return taken


def test_finite_difference_takes_two_forwards_until_each_tensor_was_measured_and_then_rarely(
    monkeypatch: pytest.MonkeyPatch,
):
    taken = Forwards(monkeypatch).of(Loop(), steps=40)
    assert taken[:2] == [(3, 0), (2, 0)], "one more tells what the first update did to the loss"
    settled = [number for number, (forwards, _) in enumerate(taken) if forwards == 0]
    assert 8 <= settled[0] <= 16
    assert {forwards for forwards, _ in taken[1:]} == {0, 2}
    assert sum(forwards for forwards, _ in taken[settled[0] :]) <= 4, "one in sixteen"


def test_finite_difference_at_the_default_cadence(monkeypatch: pytest.MonkeyPatch):
    taken = Forwards(monkeypatch).of(Loop(), steps=101, every_n_steps=50)
    assert [(step, n) for step, (n, _) in enumerate(taken) if n] == [(0, 3), (1, 2), (100, 2)]


def test_doubt_that_lasts_is_not_paid_for_every_time(monkeypatch: pytest.MonkeyPatch):
    loop = Loop()
    loop.penalty = 1.0
    taken = Forwards(monkeypatch).of(loop, steps=4)
    assert taken[0] == (7, 1), "two, two nearer by, one with a backward, and two along what that gives"
    assert sum(forwards for forwards, _ in taken) <= 7 + 3 * 2 + 5


def test_a_wrong_gradient_takes_more_forwards_until_it_is_certain(monkeypatch: pytest.MonkeyPatch):
    def halved(y: torch.Tensor) -> torch.Tensor:
        return 0.5 * y + 0.5 * y.detach()

    loop = Loop()
    for layer in loop.model.get_base_model().model.layers:
        layer.self_attn.o_proj.forward = lambda x, forward=layer.self_attn.o_proj.forward: halved(forward(x))
    taken = Forwards(monkeypatch).of(loop, steps=4)
    assert taken == [(8, 1)] * 2 + [(2, 0)] * 2, "found twice it is certain; the rest is still measured"


def test_cost_of_reading_does_not_grow_with_the_batch():
    small, large = Loop(batch=1).extra(), Loop(batch=16).extra()
    assert small == large


def test_cost_of_reading_grows_with_the_number_of_tensors_at_most():
    few, many = Loop(layers=1), Loop(layers=4)
    assert many.tensors == 4 * few.tensors
    assert sum(many.extra().values()) <= 4 * sum(few.extra().values())


def test_hooks_are_installed_once_for_steps_that_follow_each_other(monkeypatch: pytest.MonkeyPatch):
    installed = []
    works = ForwardObserver._hook
    monkeypatch.setattr(ForwardObserver, "_hook", lambda *args: (installed.append(args), works(*args))[1])
    loop = Loop()
    with loop.probe(1):
        loop.step()
        count = len(installed)
        for _ in range(6):
            loop.step()
        assert len(installed) == count


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_optimizer_kernels_are_the_same(how: str):
    def kernels(seen: Counter[str]) -> dict[str, int]:
        return {name: n for name, n in seen.items() if name.startswith("_fused") or "addcdiv" in name or "lerp" in name}

    loop = Loop(**{how: True})
    loop.step()
    plain = kernels(loop.step())
    assert plain
    with loop.probe(1):
        for _ in range(5):
            probed = kernels(loop.step())
    assert probed == plain


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo's own look (torch 2.13)
@pytest.mark.parametrize("where", ["whole model", "layers"])
def test_compiled_model_is_neither_broken_nor_compiled_again(where: str):
    """Between probed steps nothing; a probed step observes from outside of the graphs."""

    def run(probed: bool) -> tuple[list[float], int, int]:
        torch._dynamo.reset()
        counters.clear()
        loop = Loop()
        if where == "layers":
            for layer in loop.model.base_model.model.model.layers:
                layer.compile(backend="eager")
            called: Any = loop.model
        else:
            called = torch.compile(loop.model, backend="eager")
        losses = []

        def step() -> None:
            loss = called(input_ids=loop.ids, labels=loop.ids).loss
            loss.backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            losses.append(loss.item())

        if probed:
            with LoraProbeMonitor(called, loop.optimizer, every_n_steps=6, ignore=REPEATS, verbose=False) as probe:
                for _ in range(9):
                    step()
            assert probe.report.healthy is not False
            assert not probe.report.internal_errors
        else:
            for _ in range(9):
                step()
        return losses, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    assert run(probed=True) == run(probed=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
@pytest.mark.parametrize("every_n_steps", [1, 10**6])
def test_cuda_graph_of_a_step_is_captured_and_replayed_as_without_the_probe(every_n_steps: int):
    def train(probed: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = peft_llama(llama(layers=2)).cuda()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, capturable=True)
        ids = torch.randint(1, 32, (2, 8), device="cuda")

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        context = LoraProbeMonitor(model, optimizer, every_n_steps=every_n_steps, ignore=REPEATS, verbose=False)
        with context if probed else nullcontext() as probe:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(6):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            for _ in range(4):
                graph.replay()
        if probe is not None:
            assert probe.report.healthy
            assert not probe.report.internal_errors
        return [p.detach().cpu() for p in trained]

    for with_probe, without in zip(train(True), train(False), strict=True):
        assert torch.equal(with_probe, without)
