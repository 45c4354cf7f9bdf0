"""Real process groups of a few forked processes, and the runs that they make."""

from __future__ import annotations

import faulthandler
import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_probe_callbacks import LoraProbeError, LoraProbeMonitor
from lora_probe_callbacks.distributed import transport as ranks

TIMEOUT = 8  # of the process group, in seconds


@dataclass
class Outcome:
    """What one rank says of one run."""

    found: list[tuple[str, str, int]]
    messages: list[str]
    evidence: list[dict[str, str]]
    error: str
    error_text: str
    metrics: dict[str, float]
    statuses: dict[str, tuple[str, str]]
    internal: list[str]
    seconds: float
    extra: Any = None


def in_processes(
    scenarios: Mapping[str, Callable[[int, int], Any]], world: int, folder: Path, *, dying: int = 0
) -> dict[str, list[Any]]:
    """Fork ``world`` processes; each runs every scenario in a fresh process group.

    Args:
        scenarios: Name to ``scenario(rank, world)``; what it returns must pickle.
        world: Number of processes.
        folder: For the rendezvous files.
        dying: Number of processes that end without a result.

    Returns:
        Name to what the ranks returned, in order; None for those that have died.
    """
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=_all, args=(scenarios, rank, world, folder, queue), daemon=True) for rank in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[str, list[Any]] = {name: [None] * world for name in scenarios}
    try:
        for _ in range((world - dying) * len(scenarios)):
            name, rank, result = queue.get(timeout=120)
            results[name][rank] = result
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return results


def _all(scenarios: Mapping[str, Any], rank: int, world: int, folder: Path, queue: Any) -> None:
    faulthandler.dump_traceback_later(100)  # where a process hangs, before the test gives it up
    torch.set_num_threads(1)
    ranks.IN_NEED = 3.0
    for number, (name, scenario) in enumerate(scenarios.items()):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{number}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT),
        )
        began = time.monotonic()
        try:
            result = scenario(rank, world)
        except BaseException:
            result = traceback.format_exc()
        if isinstance(result, Outcome):
            result.seconds = time.monotonic() - began
        queue.put((name, rank, result))
        dist.destroy_process_group()


def batch_of(rank: int, step: int, size: int = 2) -> Tensor:
    """Other data on every rank."""
    generator = torch.Generator().manual_seed(100 + 10 * step + rank)
    return torch.randint(1, 64, (size, 12), generator=generator)


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    *,
    steps: int = 6,
    called: nn.Module | None = None,
    before: Callable[[int], None] = lambda step: None,
    after_forward: Callable[[int], None] = lambda step: None,
    before_step: Callable[[int], None] = lambda step: None,
    around: Callable[[int, int], Any] = lambda step, micro: nullcontext(),
    accumulate: int = 1,
    step: Callable[[int], Any] | None = None,
    during: Callable[[LoraProbeMonitor], Any] = lambda probe: None,
    factor: float = 1.0,
    **intent: Any,
) -> Outcome:
    """A plain loop under a monitor."""
    probe = LoraProbeMonitor(model, optimizer, **{"verbose": False, **intent})
    error: BaseException | None = None
    extra = None
    try:
        with probe:
            for number in range(steps):
                before(number)
                for micro in range(accumulate):
                    with around(number, micro):
                        ids = batch_of(rank, accumulate * number + micro)
                        loss = (called or model)(input_ids=ids, labels=ids).loss * factor
                        after_forward(number)
                        loss.backward()
                before_step(number)
                optimizer.step() if step is None else step(number)
                extra = during(probe) or extra
                optimizer.zero_grad()
    except Exception as raised:
        error = raised
    return outcome(probe.report, error, extra)


def outcome(report: Any, error: BaseException | None, extra: Any = None) -> Outcome:
    bad = report.with_status("fail", "warn")
    notes = "\n".join(getattr(error, "__notes__", []))
    return Outcome(
        found=[(f.code, f.status, f.step) for f in bad],
        messages=[f.message for f in bad],
        evidence=[{k: str(v) for k, v in f.evidence.items()} for f in bad],
        error=type(error).__name__ if error is not None else "",
        error_text="" if error is None else f"{error}\n{notes}",
        metrics=dict(report.metrics),
        statuses={f.code: (f.status, f.message) for f in report.findings},
        internal=list(report.internal_errors),
        seconds=0.0,
        extra=extra,
    )


def assert_all_found(outcomes: list[Outcome], code: str, step: int, status: str = "fail", *words: str) -> None:
    """All ranks report the same one finding, and raise together."""
    for one in outcomes:
        assert isinstance(one, Outcome), one
        assert one.found == [(code, status, step)], (one.found, one.messages, one.error_text, one.internal)
        assert one.messages == outcomes[0].messages
        assert one.error == (LoraProbeError.__name__ if status == "fail" else ""), one.error_text
        assert not one.internal, one.internal
        assert one.seconds < 60
        for word in words:
            assert word in one.messages[0], one.messages


def assert_all_healthy(outcomes: list[Outcome]) -> None:
    for one in outcomes:
        assert isinstance(one, Outcome), one
        assert not one.internal, one.internal[0]
        assert (one.found, one.error) == ([], ""), (one.messages, one.evidence, one.error_text)
        assert one.seconds < 60


def assert_all_know(outcomes: list[Outcome], code: str, step: int) -> None:
    """All ranks report the finding; where a collective of the training itself broke down, as a note on its error."""
    for one in outcomes:
        assert isinstance(one, Outcome), one
        assert not one.internal, one.internal[0]
        assert (code, "fail", step) in one.found, (one.found, one.messages, one.error_text)
        assert one.error == LoraProbeError.__name__ or code in one.error_text
        assert one.seconds < 60
