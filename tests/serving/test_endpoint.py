"""A real server in another process, which loads the saved files and speaks the protocol."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from peft import PeftModel
from support.serving import scaled, tokens
from typer.testing import CliRunner

from lora_probe_callbacks import Endpoint, verify_serving
from lora_probe_callbacks.cli import app

SERVER = Path(__file__).parents[1] / "support" / "completions_server.py"
FEW = tokens(40, 16)


@contextmanager
def serving(*arguments: object) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(SERVER), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    adapters = {"ad": folder / "adapter", "old": folder / "runs" / "checkpoint-1"}
    with serving(folder / "base", *(f"{name}={path}" for name, path in adapters.items()), "dropped=") as url:
        yield url


@pytest.mark.parametrize(
    ("model_name", "verdict"), [("ad", "served"), ("dropped", "ignored"), ("old", "stale"), ("base", "ignored")]
)
def test_served_adapter(url: str, model_name: str, verdict: str, model: PeftModel, folder: Path) -> None:
    target = Endpoint(url, model=model_name, base_model="base")
    report = verify_serving(model, FEW, target, checkpoints=[folder / "runs" / "checkpoint-1"])
    assert report.results[0].verdict == verdict, str(report)
    assert report.exit_code == (verdict != "served")


def test_base_is_found_by_itself(url: str, model: PeftModel) -> None:
    assert verify_serving(model, FEW, Endpoint(f"{url}/v1/", model="ad")).results[0].verdict == "served"


def test_adapter_that_is_not_named_is_refused_where_there_are_several(url: str, model: PeftModel) -> None:
    found = verify_serving(model, FEW, Endpoint(url)).results[0]
    assert "serves base, ad, old, dropped: say model=" in found.error


def test_protocol_without_ids_of_tokens(model: PeftModel, folder: Path) -> None:
    with serving(folder / "base", f"ad={folder / 'adapter'}", "--echo") as url:
        found = verify_serving(model, FEW, Endpoint(url)).results[0]
    assert found.verdict == "served", str(found)


def test_part_of_an_adapter(model: PeftModel, folder: Path, tmp_path: Path) -> None:
    part = scaled(model, lambda _: 1.0)
    for name, parameter in part.named_parameters():
        if "lora_B" in name and "q_proj" not in name and "v_proj" not in name:
            parameter.data.zero_()
    part.save_pretrained(tmp_path / "part")
    with serving(folder / "base", f"ad={tmp_path / 'part'}") as url:
        found = verify_serving(model, FEW, Endpoint(url)).results[0]
    assert found.verdict == "partly", str(found)


def test_what_goes_wrong_on_the_wire_is_one_line(url: str, model: PeftModel, folder: Path) -> None:
    def error(target: Endpoint) -> str:
        report = verify_serving(model, FEW, target)
        assert report.exit_code == 2
        assert "\n" not in report.results[0].error
        return report.results[0].error

    assert "does not exist" in error(Endpoint(url, model="typo", base_model="base"))
    assert "answers 404" in error(Endpoint(url, model="typo", base_model="base"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.listen()
        assert "does not answer within 0.2 s" in error(Endpoint(f"http://127.0.0.1:{port}", "a", "b", timeout=0.2))
    assert "cannot be reached" in error(Endpoint(f"http://127.0.0.1:{port}", "a", "b"))
    assert "expected http://host:port" in error(Endpoint("localhost:8000", "a", "b"))
    with serving(folder / "base", f"ad={folder / 'adapter'}", "--tokens-off") as other:
        assert "other tokens were scored" in error(Endpoint(other))
    with serving(folder / "base", f"ad={folder / 'adapter'}", "--sleep", 2) as slow:
        assert "does not answer within 0.3 s" in error(Endpoint(slow, timeout=0.3))


def test_command(url: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n".join(str(row) for row in FEW.tolist()))
    given = ["verify", "--base", str(folder / "base"), "--adapter", str(folder / "adapter"), "--device", "cpu"]
    given += ["--prompts", str(tmp_path / "prompts.jsonl")]

    def run(*more: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, [*given, *more])
        return done.exit_code, done.output

    assert run() == (0, run()[1])
    assert "adapter reloaded: served" in run()[1]
    code, said = run("--endpoint", url, "--model", "ad", "--merged", "bfloat16")
    assert code == 0, said
    code, said = run("--endpoint", url, "--model", "dropped")
    assert code == 1
    assert "LP811" in said
    code, said = run("--endpoint", "http://127.0.0.1:9", "--model", "ad")
    assert code == 2
    assert "cannot be reached" in said
    code, said = run("--merged", "float32", "--json")
    content = json.loads(said[said.index("{") :])
    assert (code, content["exit_code"], content["results"][0]["fact"]["verdict"]) == (0, 0, "served")
    code, said = run("--prompts", "nowhere.txt")
    assert code == 2
    assert "nowhere.txt" in said
