"""The record: what is in it, and what survives a kill."""

from __future__ import annotations

import getpass
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from support.records import merged_from, tiny, trained

from lora_probe_callbacks.report.record import SCHEMA, Record, RecordError, read_record
from lora_probe_callbacks.report.runs import read_runs


def lines(path: Path) -> list[dict[str, Any]]:
    return list(read_record(path))


def of_kind(path: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in lines(path) if line["kind"] == kind]


def layouts(path: Path) -> list[list[dict[str, Any]]]:
    return [line["tensors"] for line in of_kind(path, "decision") if "tensors" in line]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("record") / "run.jsonl"
    trained(path, steps=6)
    return path


def test_every_line_has_the_schema_and_there_is_one_for_each_decision(healthy: Path) -> None:
    assert {line["schema"] for line in lines(healthy)} == {SCHEMA}
    assert [line["kind"] for line in lines(healthy)] == ["start", *["decision"] * 8, "end"]
    assert [(d["moment"], d["step"]) for d in of_kind(healthy, "decision")] == [
        ("start", 0),
        *(("step", step) for step in range(6)),
        ("end", 5),
    ]


def test_gradients_and_updates_are_those_of_the_tensors_in_the_layout(healthy: Path) -> None:
    (tensors,) = layouts(healthy)
    assert [t["role"] for t in tensors] == ["A", "B"] * 4
    assert tensors[0]["layer"].endswith("layers.0.self_attn.q_proj")
    first, second = of_kind(healthy, "decision")[1:3]
    assert len(first["gradients"]) == len(tensors)
    assert [g == 0 for g in first["gradients"]] == [True, False] * 4  # B is zero before the first step
    assert all(g > 0 for g in second["gradients"])
    assert second["update_step"] == 0
    assert all(size > 0 for size in second["updates"])


def test_metrics_of_every_step_are_in_the_record_once(healthy: Path) -> None:
    rows = [row for d in of_kind(healthy, "decision") for row in d["metrics"]]
    steps = [row["framework_step"] for row in rows if "lora_probe/healthy" in row["values"]]
    moved = [row["framework_step"] for row in rows if "lora_probe/update/relative_norm" in row["values"]]
    assert steps == list(range(6))
    assert moved == list(range(6))


def test_environment_says_versions_and_devices_but_no_user_host_or_path(healthy: Path) -> None:
    environment = of_kind(healthy, "start")[0]["environment"]
    assert environment["versions"].keys() >= {"torch", "peft", "lora_probe_callbacks"}
    assert environment["devices"] == ["cpu"]
    text = healthy.read_text()
    assert str(Path.home()) not in text
    assert str(healthy.parent) not in text
    assert platform.node() not in text
    assert f"/{getpass.getuser()}/" not in text


def test_finding_is_in_the_line_of_its_decision(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    trained(path, event=merged_from(5))
    decision = next(d for d in of_kind(path, "decision") if d["findings"])
    assert decision["step"] == 5
    assert [f["code"] for f in decision["findings"]] == ["LP103"]
    assert decision["verdicts"]["LP103"]["status"] == "fail"
    assert set(decision["gradients"]) == {"none"}
    (end,) = of_kind(path, "end")
    assert end["healthy"] is False


def test_killed_run_leaves_every_finished_line_and_its_findings(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    code = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from pathlib import Path\n"
        "from support.records import trained\n"
        "def event(step, model):\n"
        "    if step == 3: model.merge_adapter()\n"
        "    if step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"trained(Path({str(path)!r}), event=event, on_failure='stop')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [d["step"] for d in of_kind(path, "decision")] == [0, 0, 1, 2, 3, 4]
    (run,) = read_runs(path)
    assert not run.ended
    assert [f.code for f in run.report.failures] == ["LP103"]
    assert run.report.failures[0].step == 3
    assert run.report.exit_code == 1
    assert {f.code for f in run.report.with_status("pass")} >= {"LP201", "LP501"}


def test_runs_read_back_say_what_the_report_said(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    report = trained(path, steps=5)
    (run,) = read_runs(path)
    assert [(f.code, f.status, f.step) for f in run.report.findings] == [
        (f.code, f.status, f.step) for f in report.findings
    ]
    assert run.report.exit_code == report.exit_code == 0
    assert run.report.metrics == report.metrics
    assert run.history.rows == report.history.rows


def test_run_without_its_last_line_gives_the_same_verdicts(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    report = trained(path, steps=5)
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join(text[:-1]))
    (run,) = read_runs(path)
    assert not run.ended
    # That a check had nothing to look at is certain only when the run has ended.
    ended = {f.code: "pending" if f.message.startswith("not applicable") else f.status for f in report.findings}
    assert {f.code: f.status for f in run.report.findings} == ended


def test_half_line_at_the_end_is_passed_over(healthy: Path, tmp_path: Path) -> None:
    data = healthy.read_bytes()
    for cut in (2, 40, 200):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(data[:-cut])
        assert lines(path) == lines(healthy)[:-1]


def test_run_after_a_half_line_is_readable(healthy: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(healthy.read_bytes()[:-40])
    trained(path, steps=4)
    first, second = read_runs(path)
    assert not first.ended
    assert first.steps == list(range(6))
    assert second.ended
    assert second.steps == list(range(4))


def test_broken_line_in_the_middle_of_a_run_is_an_error(healthy: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    text = healthy.read_text().splitlines(keepends=True)
    text[3] = text[3][:30] + "\n"
    path.write_text("".join(text))
    with pytest.raises(RecordError, match="line 4 that is no JSON"):
        lines(path)


def test_later_schema_is_refused_with_what_to_do(healthy: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(healthy.read_text().replace(f'"schema":{SCHEMA}', f'"schema":{SCHEMA + 1}'))
    with pytest.raises(RecordError, match=f"schema {SCHEMA + 1} in line 1, expected at most {SCHEMA}.*upgrade"):
        lines(path)


@pytest.mark.parametrize("content", [b"hello\n", b"\x00\xff\xfe\n\x81\n", b'{"a": 1}\n', b"[1]\n", b""])
def test_file_that_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match="expected a record"):
        read_runs(path)


def test_line_of_a_record_that_lacks_something_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"schema":1,"kind":"start"}\n{"schema":1,"kind":"decision"}\n')
    with pytest.raises(RecordError, match="lacks something"):
        read_runs(path)


def test_numbers_that_are_not_finite_are_told_apart_from_missing_gradients(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    def event(step: int, model: Any) -> None:
        if step == 4:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    trained(path, event=event)
    last = of_kind(path, "decision")[-1]
    assert "non-finite" in last["gradients"]
    assert "none" not in last["gradients"]
    assert "NaN" not in path.read_text()


def test_traceback_in_the_record_names_files_but_no_folders(tmp_path: Path) -> None:
    record = Record(tmp_path / "run.jsonl")
    record.error(3, f'  File "/home/alice/secret/train.py", line 3\n  {Path.home()}/x\n  File "C:\\Users\\bob\\t.py"')
    (line,) = lines(tmp_path / "run.jsonl")
    assert 'File "train.py"' in line["traceback"]
    assert not any(word in line["traceback"] for word in ("alice", "bob", f"{Path.home()}/"))


def test_record_that_cannot_be_written_does_not_stop_the_probing(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "run.jsonl"

    def event(step: int, model: Any) -> None:
        if step == 2:
            path.unlink()
            path.mkdir()  # now nothing can be appended
        if step == 5:
            model.merge_adapter()

    report = trained(path, event=event)
    assert [f.code for f in report.failures] == ["LP103"]
    assert any("IsADirectoryError" in trace for trace in report.internal_errors)


def test_tensors_of_an_adapter_that_is_not_meant_to_train_are_not_in_the_layout(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    def event(step: int, model: Any) -> None:
        if step == 2:
            model.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj"]))

    trained(path, event=event, on_failure="stop", adapter=["default"])
    assert [len(layout) for layout in layouts(path)] == [8]
    assert {len(d["gradients"]) for d in of_kind(path, "decision") if d["moment"] == "step"} == {8}


def test_tiny_model_has_eight_adapter_tensors() -> None:
    assert sum(p.requires_grad for p in tiny().parameters()) == 8
