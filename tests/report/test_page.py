"""The page: everything is on it, everything is escaped, and a real browser has nothing to complain of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.records import merged_from, trained

from lora_probe_callbacks.report.page import page
from lora_probe_callbacks.report.runs import read_runs

SECTIONS = (
    "findings proofs timeline gradients updates estimator examples step-response metrics not-judged environment".split()  # noqa: SIM905
)
HOSTILE = (
    "</title></style></pre><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&\x00\u202e\ud800"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

Line = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def healthy(folder: Path) -> Path:
    trained(folder / "healthy.jsonl", steps=6)
    return folder / "healthy.jsonl"


@pytest.fixture(scope="module")
def merged(folder: Path) -> Path:
    trained(folder / "merged.jsonl", event=merged_from(5))
    return folder / "merged.jsonl"


def drawn(record: Path) -> str:
    return page(read_runs(record))


def changed(record: Path, path: Path, change: Callable[[Line], Line | None]) -> Path:
    """A copy of a record whose lines were changed, or left out."""
    found = [change(json.loads(line)) for line in record.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in found if line is not None))
    return path


def section(html: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">(.*?)</section>', html, re.DOTALL)
    assert found is not None, name
    return found.group(1)


class Elements(HTMLParser):
    """What a browser would find."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_section_is_there_and_linked(healthy: Path) -> None:
    elements = Elements(drawn(healthy))
    ids = [attributes["id"] for tag, attributes in elements.tags if tag == "section"]
    links = [attributes["href"] for tag, attributes in elements.tags if tag == "a"]
    assert ids == SECTIONS
    assert links == [f"#{name}" for name in SECTIONS]
    assert elements.open == []


def test_page_needs_nothing_from_elsewhere_and_allows_no_script(healthy: Path) -> None:
    html = drawn(healthy)
    elements = Elements(html)
    assert not {tag for tag, _ in elements.tags} & {"script", "link", "img", "iframe", "object", "form"}
    assert not re.search(r"https?://", html)
    policy = next(a["content"] for t, a in elements.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy


def test_healthy_run_says_so_and_how_much_it_rests_on(healthy: Path) -> None:
    html = drawn(healthy)
    assert "<h1>Healthy</h1>" in html
    assert "over 6 probed steps, none failed" in html
    assert "No check has failed or warned" in section(html, "findings")


def test_failure_is_on_top_with_evidence_and_fix(merged: Path) -> None:
    html = drawn(merged)
    assert "<h1>Unhealthy</h1>" in html
    findings = section(html, "findings")
    assert "LP103 merged-adapter" in findings
    assert "merged in 4 of 4 adapted layers" in findings
    assert "Call unmerge_adapter() in a finally block" in findings
    assert "last healthy step" in findings


def test_timeline_has_a_strip_for_each_check_and_marks_the_failure_by_sign_too(merged: Path) -> None:
    (run,) = read_runs(merged)
    timeline = section(drawn(merged), "timeline")
    assert len(re.findall('class="strip[ "]', timeline)) == len(run.start["checks"]) + 1  # and the axis
    failed = re.findall(r'<span class="seg fail" title="([^"]*)" style="grid-column:(\d+)/(\d+)">', timeline)
    assert len(failed) == 1
    assert failed[0][0].startswith("step 5: fails (the adapter was merged")
    assert (int(failed[0][1]), int(failed[0][2])) == (7, 8)  # after the start and the steps 0 to 4
    assert "✕" in timeline


def test_verdict_on_an_update_stands_at_the_step_that_made_it(healthy: Path, folder: Path) -> None:
    def change(line: Line) -> Line:
        if line["kind"] == "decision" and line["step"] == 4:
            line["verdicts"]["LP401"] = {"status": "fail", "message": "stuck", "of_update": True}
        return line

    timeline = section(drawn(changed(healthy, folder / "late.jsonl", change)), "timeline")
    assert re.search(r'seg fail" title="step 3: fails \(stuck\)', timeline)


def test_heatmaps_draw_the_zero_of_a_and_the_missing_gradients_as_signs(merged: Path) -> None:
    gradients = section(drawn(merged), "gradients")
    maps = re.findall(r'<svg class="heat".*?</svg>', gradients)
    assert len(maps) == 2
    assert "url(#sign-zero)" in maps[0]  # A, while B is zero
    assert "url(#sign-zero)" not in maps[1]
    assert all("url(#sign-none)" in drawn_map for drawn_map in maps)
    assert "0 q_proj" in gradients
    assert section(drawn(merged), "updates").count('<svg class="heat"') == 2


def test_what_was_not_judged_says_why(healthy: Path) -> None:
    (run,) = read_runs(healthy)
    text = section(drawn(healthy), "not-judged")
    left = run.report.with_status("pending", "skipped")
    assert left
    assert all(finding.code in text and finding.message in text for finding in left)


def test_estimator_and_step_response_are_said_to_be_missing(healthy: Path, folder: Path) -> None:
    def change(line: Line) -> Line:
        for row in line.get("metrics", ()):
            row["values"] = {k: v for k, v in row["values"].items() if "step_response" not in k}
        return line

    html = drawn(changed(healthy, folder / "without.jsonl", change))
    assert "No estimator was recorded" in section(html, "estimator")
    assert "No step response was recorded" in section(html, "step-response")


def test_estimator_and_step_response_are_drawn_where_they_were_logged(healthy: Path, folder: Path) -> None:
    def change(line: Line) -> Line:
        for row in line.get("metrics", ()):
            delta = 0.1 * row["framework_step"] - 0.2
            row["values"] |= {
                "lora_probe/estimator/delta_1": delta,
                "lora_probe/estimator/standard_error": 0.05,
                "lora_probe/estimator/count": 8.0,
                "lora_probe/step_response/measured": -0.098,
                "lora_probe/step_response/predicted": -0.1,
                "lora_probe/step_response/ratio": 0.98,
            }
        return line

    html = drawn(changed(healthy, folder / "estimator.jsonl", change))
    assert 'class="band"' in section(html, "estimator")
    assert "its interval at 95%" in section(html, "estimator")
    assert 'class="line a"' in section(html, "step-response")
    assert 'class="line b"' in section(html, "step-response")
    assert "ratio" in section(html, "step-response")


def test_environment_can_be_pasted(merged: Path) -> None:
    text = section(drawn(merged), "environment")
    assert re.search(r"torch \d+\.\d+", text)
    assert "devices: cpu" in text
    assert "LP103 merged-adapter (fail, step 5)" in text
    assert str(Path.home()) not in text


def test_run_without_an_end_is_marked(healthy: Path, folder: Path) -> None:
    html = drawn(changed(healthy, folder / "killed.jsonl", lambda line: None if line["kind"] == "end" else line))
    assert "The record has no end" in html
    assert "The record has no end" not in drawn(healthy)


def test_last_of_several_runs_is_shown_and_the_others_are_mentioned(healthy: Path, merged: Path, folder: Path) -> None:
    path = folder / "both.jsonl"
    path.write_text(merged.read_text() + healthy.read_text())
    html = drawn(path)
    assert "<h1>Healthy</h1>" in html
    assert "holds 2 runs; shown is the last. Before it: unhealthy." in html


def test_run_that_was_never_judged_is_not_called_healthy(healthy: Path, folder: Path) -> None:
    html = drawn(changed(healthy, folder / "began.jsonl", lambda line: line if line["kind"] == "start" else None))
    assert "<h1>Unproven</h1>" in html
    assert "No decision was recorded" in section(html, "timeline")


def test_many_layers_and_steps_are_joined_and_the_page_stays_small(healthy: Path, folder: Path) -> None:
    layers, steps = 196, 900
    found = [json.loads(line) for line in healthy.read_text().splitlines()]
    start, decision = found[0], next(d for d in found if d.get("step") == 2)
    tensors = [
        {"layer": f"model.layers.{i // 7}.m{i % 7}", "name": f"{i}{role}", "role": role, "adapter": "default"}
        for i in range(layers)
        for role in "AB"
    ]
    path = folder / "long.jsonl"
    with path.open("w") as file:
        file.write(json.dumps(start) + "\n")
        for step in range(steps):
            norms = [1e-3 * (1 + (i * 7 + step) % 97) for i in range(2 * layers)]
            filled = {"step": step, "update_step": step - 1, "gradients": norms, "updates": norms, "metrics": []}
            filled |= {"tensors": tensors} if step == 0 else {}
            file.write(json.dumps(decision | filled) + "\n")
    html = drawn(path)
    assert "each row joins 3 layers" in html.lower()
    assert "each column joins 13 probed steps" in html
    assert len(html) < 1_500_000


def hostile(value: Any, key: str = "") -> Any:
    """The same, with a hostile text in the place of every text that is not part of the form."""
    if isinstance(value, dict):
        return {(HOSTILE if key in ("evidence", "versions") else k): hostile(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v, key) for v in value]
    kept = ("kind", "status", "moment", "role", "code", "gradients", "updates")
    return HOSTILE if isinstance(value, str) and key not in kept else value


@pytest.fixture(scope="module")
def attacked(merged: Path, folder: Path) -> Path:
    lines = [hostile(json.loads(line)) for line in merged.read_text().splitlines()]
    lines.insert(3, {"schema": 1, "kind": "error", "step": 0, "traceback": HOSTILE})
    for line in lines:
        for row in line.get("metrics", ()):
            row["values"][f"lora_probe/{HOSTILE}"] = 1.0
        if "verdicts" in line:
            line["verdicts"][HOSTILE] = {"status": "fail", "message": HOSTILE}
    path = folder / "attacked.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_everything_from_the_record_is_escaped(attacked: Path) -> None:
    html = drawn(attacked)
    elements = Elements(html.replace("\x00", ""))
    assert html.count("&lt;script&gt;") > 20
    assert not {tag for tag, _ in elements.tags} & {"script", "img"}
    assert not [a for _, a in elements.tags if any(name.startswith("on") for name in a)]
    assert elements.open == []


def browser(html: str, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8", errors="replace")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
    )
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", *options, path.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=120)


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_browser_shows_every_section_without_a_complaint(merged: Path, tmp_path: Path) -> None:
    done = browser(drawn(merged), tmp_path, "--dump-dom")
    assert complaints(done) == []
    assert all(f'<section id="{name}">' in done.stdout for name in SECTIONS)
    assert "<h1>Unhealthy</h1>" in done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_browser_runs_nothing_that_a_record_holds(attacked: Path, tmp_path: Path) -> None:
    done = browser(drawn(attacked), tmp_path, "--dump-dom")
    assert complaints(done) == []  # not even a refusal: there was nothing to refuse
    assert "<title>LoRA probe: unhealthy</title>" in done.stdout
    assert all(f'<section id="{name}">' in done.stdout for name in SECTIONS)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [360, 1280])
def test_page_is_no_wider_than_its_window(attacked: Path, merged: Path, tmp_path: Path, width: int) -> None:
    # In a frame of that width (a headless window has 500 at least), with a script that the page itself forbids.
    tell = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script></body>"
    outer = (
        "<script>onmessage = e => document.documentElement.dataset.wide = e.data</script>"
        f"<iframe src='inner.html' style='width:{width}px;height:800px;border:0'></iframe>"
    )
    for record in (attacked, merged):
        inner = re.sub(r"<meta http-equiv[^>]*>", "", drawn(record)).replace("</body>", tell)
        (tmp_path / "inner.html").write_text(inner, encoding="utf-8", errors="replace")
        done = browser(outer, tmp_path, "--dump-dom", "--virtual-time-budget=3000")
        wide = re.search(r'data-wide="(\d+)"', done.stdout)
        assert wide is not None
        assert int(wide.group(1)) <= width


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_screenshot_in_light_and_dark_differ(merged: Path, tmp_path: Path) -> None:
    shots = []
    for number, options in enumerate(((), ("--blink-settings=preferredColorScheme=0",))):
        shot = tmp_path / f"{number}.png"
        browser(drawn(merged), tmp_path, f"--screenshot={shot}", "--window-size=1280,900", *options)
        shots.append(shot.read_bytes())
    assert all(shot.startswith(b"\x89PNG") and len(shot) > 10_000 for shot in shots)
    assert shots[0] != shots[1]
