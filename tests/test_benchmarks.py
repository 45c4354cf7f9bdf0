"""The benchmark and its table run from end to end, at a shape that takes seconds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# torch 2.13 scripts its decompositions for forward mode with what it has deprecated
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_results_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    projection: Any = loaded("projection")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(projection, "TINY", {**sizes, "num_key_value_heads": 1, "vocab_size": 64})
    settings = [
        projection.Setting("tiny", "float32", attention, False, 2, 2, 8, projection.EVERY)
        for attention in ("eager", "sdpa")
    ]
    monkeypatch.setattr(projection, "settings", lambda device: settings)
    projection.main(["--device", "cpu", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "projection-cpu.json").read_text())
    rows = {(row["attention"], row["backend"]): row for row in result["rows"]}
    assert len(rows) == 10
    assert result["versions"].keys() == {"torch", "transformers", "peft", "bitsandbytes"}
    for backend in ("doubled_rank", "alpha", "jvp"):
        assert rows["eager", backend]["error_to_loop"] < 1e-4
        assert rows["eager", backend]["gib"] > 0
    assert "fused attention" in rows["sdpa", "alpha"]["failed"]

    lines = loaded("readme").projection_table(result).splitlines()
    assert sum(line.startswith("| tiny") for line in lines) == 2
    assert any("training step" in line for line in lines)


def test_the_readme_is_made_of_the_results() -> None:
    readme: Any = loaded("readme")
    text = (BENCHMARKS.parent / "README.md").read_text()
    assert readme.filled(text, BENCHMARKS / "results") == text, "run: python benchmarks/readme.py --readme README.md"
    with pytest.raises(SystemExit, match="lacks the markers"):
        readme.filled("no markers", BENCHMARKS / "results")


def test_the_page_of_versions_is_made_of_the_results() -> None:
    readme: Any = loaded("readme")
    page = BENCHMARKS.parent / "docs" / "frameworks" / "versions.md"
    made = readme.filled(page.read_text(), BENCHMARKS / "results", readme.PAGE)
    assert made == page.read_text(), f"run: python benchmarks/readme.py --page {page}"
