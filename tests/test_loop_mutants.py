"""Mutants of training scripts: what is changed, and what counts as the truth about it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import loop_mutants
    finally:
        sys.path.remove(str(BENCHMARKS))
    return loop_mutants


def test_the_same_seed_makes_the_same_mutants_and_each_is_a_changed_script(benchmark: Any) -> None:
    first, second = (benchmark.sample(benchmark.SCRIPTS, 60, 0) for _ in range(2))
    assert first == second
    assert first != benchmark.sample(benchmark.SCRIPTS, 60, 1)
    assert len({m.key for m in first}) == 60
    assert {m.script for m in first} == set(benchmark.SCRIPTS)
    assert {m.operator for m in first} >= {"insert", "wrap", "constant", "delete", "double", "swap"}
    for mutant in first:
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(benchmark.SCRIPTS[mutant.script]))
        assert "Probe" in mutant.source  # the call of the probe itself is left alone


def run(benchmark: Any, *moves: int, last: float = 1.0, **changes: Any) -> Any:
    """A run of 20 steps of A and B, each of which moves in so many of them."""
    names = ("lora_A", "lora_B")
    states = [{n: str(min(step, most)) for n, most in zip(names, moves, strict=True)} for step in range(21)]
    way = {n: np.array([last, 1.0]) * most for n, most in zip(names, moves, strict=True)}
    return benchmark.Run(**{"states": states, "others": [""] * 21, "way": way, **changes})


@pytest.mark.parametrize(
    ("moves", "changes", "expected"),
    [
        ((20, 20), {}, "unchanged"),
        ((0, 0), {}, "dead"),
        ((2, 2), {}, "dead"),  # the last 18 of 20 steps
        ((2, 20), {}, "partly dead"),
        ((10, 10), {}, "bent"),  # too short a time to tell
        ((0, 20), {"frozen": frozenset({"lora_A"})}, "declared"),
        ((20, 20), {"error": "ValueError: "}, "crashed"),
        ((20, 20), {"error": "endless"}, "endless"),
    ],
)
def test_truth(benchmark: Any, moves: tuple[int, int], changes: dict[str, Any], expected: str) -> None:
    found = benchmark.truth(run(benchmark, 20, 20), run(benchmark, *moves, **changes))
    assert found["truth"] == expected


def test_an_adapter_that_ends_where_it_began_is_dead_whatever_it_did_between(benchmark: Any) -> None:
    mutant = run(benchmark, 20, 20)
    mutant.states[-1] = mutant.states[0]
    assert benchmark.truth(run(benchmark, 20, 20), mutant)["truth"] == "dead"


@pytest.mark.parametrize(
    ("truth", "statuses", "expected"),
    [
        ("dead", ("unhealthy", "unproven"), "ok"),
        ("dead", ("healthy", "unhealthy"), "missed"),
        ("partly dead", ("unhealthy", "healthy"), "missed"),
        ("unchanged", ("healthy", "healthy"), "ok"),
        ("unchanged", ("healthy", "unproven"), "disturbed"),
    ],
)
def test_verdict(benchmark: Any, truth: str, statuses: tuple[str, str], expected: str) -> None:
    said = {name: {"status": s, "found": []} for name, s in zip(benchmark.CADENCES, statuses, strict=True)}
    assert benchmark.verdict({"truth": truth, **said}) == expected
    late = {"truth": truth, "last moved at step": 7, **said}
    if expected == "missed":  # at the default cadence nobody looks that late
        assert benchmark.verdict(late) == ("missed" if statuses[1] == "healthy" else "ok")


def test_a_script_that_is_changed_to_train_nothing_is_told(benchmark: Any) -> None:
    """From end to end, with the processes."""
    mutant = next(
        m
        for m in benchmark.sample({"plain": benchmark.SCRIPTS["plain"]}, 400, 0)
        if m.operator == "delete" and m.text == "loss.backward()"
    )
    row = benchmark.judge(mutant, benchmark.run_apart("plain", benchmark.SCRIPTS["plain"], False))
    assert row["truth"] == "dead"
    assert [row[name]["status"] for name in benchmark.CADENCES] == ["unhealthy", "unhealthy"]
    assert row["verdict"] == "ok"
