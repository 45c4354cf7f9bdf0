"""The command: what it prints, where, and its exit codes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lora_probe_callbacks import LoraProbeError, LoraProbeMonitor
from lora_probe_callbacks.checks._catalogue import all_checks
from lora_probe_callbacks.cli import app
from lora_probe_callbacks.faults import FAULTS

SMALL = ["--batch", "2", "--G", "2", "--prompt-lens", "5,3", "--gen-lens", "4", "--device", "cpu"]

# What a user's file holds; the last line is each test's own.
CONFIG = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print("noise of the user's own")
torch.manual_seed(0)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
rows = torch.randint(32, (2, 6))

def parts():
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=16, **SIZES))
    base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return model, optimizer, {"input_ids": rows, "labels": rows}

def merged():
    model, optimizer, batch = parts()
    model.merge_adapter()
    return model, optimizer, batch

def named():
    model, optimizer, batch = parts()
    loss_fn = lambda model, batch: model(**batch).loss * 2
    return {"model": model, "optimizer": optimizer, "batch": batch, "loss_fn": loss_fn, "adapter": "default"}

def broken():
    raise RuntimeError("two\\nlines")

def wrong():
    return 3
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=32, **sizes))
    base.save_pretrained(path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(path / "fresh")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.save_pretrained(path / "zero")
    (path / "config.py").write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def record(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "run.jsonl"
    space: dict[str, Any] = {}
    exec(CONFIG.replace("print(", "str("), space)
    model, optimizer, batch = space["parts"]()
    probe = LoraProbeMonitor(model, optimizer, record=path, verbose=False)

    def train() -> None:
        with probe:
            for step in range(4):
                if step == 2:
                    model.merge_adapter()
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    with pytest.raises(LoraProbeError):
        train()
    assert probe.report.exit_code == 1
    return path


def lora_probe(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def error_line(result: Result) -> str:
    """Exit code 2, nothing on stdout, one line on stderr and no traceback."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("lora-probe: ")
    return result.stderr


# --- debug --------------------------------------------------------------------------------------


def test_debug_of_a_sound_adapter(folder: Path) -> None:
    result = lora_probe("debug", "--base", folder / "base", "--adapter", folder / "fresh", *SMALL)
    assert result.exit_code == 0
    assert "4 adapter tensors in 2 layers" in result.stdout
    assert "B is still zero" in result.stdout
    assert "The adapter is sound" in result.stdout
    assert all(f" {v}  " in result.stdout or f"\n{v}" in result.stdout for v in "ABCD")
    assert result.stderr == ""  # no progress where there is no terminal


def test_debug_of_a_broken_adapter_exits_with_1(folder: Path) -> None:
    result = lora_probe("debug", "--base", folder / "base", "--adapter", folder / "zero", *SMALL)
    assert result.exit_code == 1
    assert "Wrong: switching the adapter on changes no logit" in result.stdout


def test_debug_prints_one_json_object(folder: Path) -> None:
    result = lora_probe("debug", "--base", folder / "base", *SMALL, "--json", "--attn", "eager")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["schema"] == 1
    assert found["healthy"] is True
    assert [v["variant"] for v in found["variants"]] == ["A", "B", "C", "D"]
    assert {p["backend"] for p in found["projections"] if p["s"]} == {"loop", "doubled_rank", "alpha"}


def test_debug_shows_every_layer_on_request(folder: Path) -> None:
    brief = lora_probe("debug", "--base", folder / "base", *SMALL).stdout
    full = lora_probe("debug", "--base", folder / "base", *SMALL, "--per-layer").stdout
    assert full.count("lora_A.default.weight") == 7  # every linear layer of the one block
    assert brief.count("lora_A.default.weight") < 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base", "./nothing"], "got --base ./nothing, which is no folder"),
        (["--base", "BASE", "--adapter", "./nothing"], "got --adapter ./nothing, which is no folder"),
        (["--base", "BASE", "--adapter", "BASE"], "without adapter_config.json"),
        (["--base", "BASE", "--prompt-lens", "a"], "got --prompt-lens 'a'"),
        (["--base", "BASE", "--gen-lens", "0"], "expected lengths of at least 1"),
        (["--base", "BASE", "--gen-lens", "400"], "at most 32"),
        (["--base", "BASE", "--device", "cuda:99"], "CUDA device"),
        (["--base", "BASE", "--attn", "abacus"], "cannot be loaded"),
    ],
)
def test_debug_that_cannot_begin_says_so_in_one_line(folder: Path, arguments: list[str], said: str) -> None:
    given = [str(folder / "base") if a == "BASE" else a for a in arguments]
    assert said in error_line(lora_probe("debug", *SMALL, *given))


def test_debug_shows_the_traceback_only_on_request(folder: Path) -> None:
    result = lora_probe("debug", "--base", folder / "nothing", "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("lora-probe: got --base")


# --- preflight ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "code"), [("parts", 0), ("named", 0), ("merged", 1)])
def test_preflight_exits_with_its_verdict(folder: Path, function: str, code: int) -> None:
    result = lora_probe("preflight", f"{folder / 'config.py'}:{function}")
    assert result.exit_code == code
    assert ("LP103" in result.stdout.split("LP101")[0]) == bool(code)


def test_preflight_prints_one_json_object_whatever_the_users_code_prints(folder: Path) -> None:
    result = lora_probe("preflight", f"{folder / 'config.py'}:merged", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (found["schema"], found["healthy"]) == (1, False)
    assert found["findings"][0]["code"] == "LP103"
    assert "noise" in result.stderr


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("config.py", "expected FILE.py:function"),
        ("nothing.py:parts", "which is no file"),
        ("config.py:nothing", "defines no function 'nothing'"),
    ],
)
def test_preflight_of_what_is_not_there(folder: Path, config: str, said: str) -> None:
    result = lora_probe("preflight", f"{folder}/{config}", "--json")
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize(("function", "said"), [("broken", "RuntimeError: two lines"), ("wrong", "got int from")])
def test_preflight_of_a_function_that_fails(folder: Path, function: str, said: str) -> None:
    result = lora_probe("preflight", f"{folder / 'config.py'}:{function}")
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


# --- report, checks, explain --------------------------------------------------------------------


def test_report_shows_the_run_writes_the_page_and_exits_with_the_verdict(record: Path, folder: Path) -> None:
    out = folder / "pages" / "run.html"
    result = lora_probe("report", record, "--html", out)
    assert result.exit_code == 1
    assert "LP103 merged-adapter" in result.stdout
    assert "<h1>Unhealthy</h1>" in out.read_text(encoding="utf-8")


def test_report_prints_one_json_object(record: Path) -> None:
    found = json.loads(lora_probe("report", record, "--json").stdout)
    assert found["healthy"] is False
    assert found["findings"][0]["step"] == 2


def test_report_of_what_is_no_record(folder: Path) -> None:
    assert "No such file" in error_line(lora_probe("report", folder / "nothing.jsonl"))
    assert "expected a record" in error_line(lora_probe("report", folder / "config.py"))


def test_report_of_a_later_schema(folder: Path) -> None:
    path = folder / "later.jsonl"
    path.write_text('{"schema": 99, "kind": "start"}\n')
    assert "upgrade lora_probe_callbacks" in error_line(lora_probe("report", path))


def test_report_of_a_run_that_was_not_judged_exits_with_2(record: Path, folder: Path) -> None:
    path = folder / "began.jsonl"
    path.write_text(record.read_text().splitlines()[0] + "\n")
    result = lora_probe("report", path)
    assert result.exit_code == 2
    assert "UNPROVEN" in result.stdout
    assert "the record ends in the middle of a run" in result.stdout


def test_checks_lists_every_check() -> None:
    text = lora_probe("checks").stdout
    found = json.loads(lora_probe("checks", "--json").stdout)
    assert [c["code"] for c in found["checks"]] == [c.code for c in all_checks()]
    assert all(c.code in text for c in all_checks())


def test_explain_by_code_by_name_and_all() -> None:
    assert lora_probe("explain", "LP103").stdout == lora_probe("explain", "merged-adapter").stdout
    assert lora_probe("explain", "lp103").stdout.startswith("LP103 merged-adapter (activation)")
    everything = lora_probe("explain", "--all").stdout
    assert all(f"{c.code} {c.name} ({c.family})" in everything for c in all_checks())


@pytest.mark.parametrize("arguments", [[], ["LP103", "--all"], ["LP999"]])
def test_explain_of_nothing_both_or_an_unknown_code(arguments: list[str]) -> None:
    result = lora_probe("explain", *arguments)
    assert result.exit_code == 2
    assert "expected" in result.stderr


def test_listing_the_checks_does_not_load_transformers() -> None:
    code = (
        "import sys\n"
        "from lora_probe_callbacks.cli import app\n"
        "app(['explain', 'LP103'], standalone_mode=False)\n"
        "assert 'transformers' not in sys.modules and 'peft' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "LP103" in done.stdout


# --- selftest -----------------------------------------------------------------------------------


def test_selftest_finds_every_fault_in_time_and_nothing_beside_it() -> None:
    result = lora_probe("selftest", "--json")
    rows = json.loads(result.stdout)["faults"]
    assert {row["fault"] for row in rows} == set(FAULTS)
    assert [row for row in rows if not row["found"]] == []
    assert all(row["code"] == row["expected"] and row["step"] <= row["by_step"] and not row["others"] for row in rows)
    assert result.exit_code == 0


def test_selftest_that_misses_a_fault_says_which_and_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(FAULTS) - {"left_merged", "left_disabled"}:
        monkeypatch.delitem(FAULTS, name)
    monkeypatch.setitem(FAULTS, "left_merged", dataclasses.replace(FAULTS["left_merged"], code="LP102"))
    result = lora_probe("selftest")
    assert result.exit_code == 1
    assert "LP103, not LP102" in result.stdout
    assert "1 of 2 faults found" in result.stdout
    assert "missed: left_merged" in result.stderr
