"""The page: a record as one HTML file that opens from disk and needs nothing else.

No script and no network: its content security policy forbids both, so that not even a text that
slipped through unescaped could do anything. Colours are never alone: verdicts differ in pattern and
sign as well, heatmaps in lightness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from lora_probe_callbacks.report._page_maps import maps
from lora_probe_callbacks.report._page_metrics import estimator, examples, metrics, step_response
from lora_probe_callbacks.report._page_timeline import timeline
from lora_probe_callbacks.report._page_words import GLYPHS, WORDS, count
from lora_probe_callbacks.report.charts import PATTERNS
from lora_probe_callbacks.report.findings import Finding
from lora_probe_callbacks.report.html import Html, join, tag
from lora_probe_callbacks.report.runs import Run

__all__ = ["page"]

_MARKS = {
    "pass": "M14 25L22 33L37 17",
    "warn": "M25 13V28M25 36V36.5",
    "fail": "M16 16L34 34M34 16L16 34",
    "unknown": "M19 19Q19 13 25 13Q31 13 31 19Q31 23 25 26V29M25 36V36.5",
}

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(runs: Sequence[Run]) -> str:
    """Draw the last run of a record; earlier ones are listed.

    Args:
        runs: From :func:`~lora_probe_callbacks.report.runs.read_runs`.

    Returns:
        The HTML.
    """
    run = runs[-1]
    title, kind, lead = _verdict(run)
    sections = (
        ("findings", "Findings", _findings(run)),
        ("proofs", "Proofs", _proofs(run)),
        ("timeline", "Timeline of the checks", timeline(run)),
        ("gradients", "Gradient norms", maps(run, "gradients")),
        ("updates", "Update sizes", maps(run, "updates")),
        ("estimator", "Predicted change", estimator(run)),
        ("examples", "Examples", examples(run)),
        ("step-response", "Step response", step_response(run)),
        ("metrics", "Metrics", metrics(run)),
        ("not-judged", "What was not judged", _not_judged(run)),
        ("environment", "Environment", _environment(run, title)),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"LoRA probe: {title.lower()}"),
        tag("style", Html(files(__package__).joinpath("page.css").read_text(encoding="utf-8"))),
    )
    body = tag(
        "body",
        PATTERNS,
        _header(runs, title, kind, lead, [(name, text) for name, text, _ in sections]),
        tag("main", *(tag("section", tag("h2", text), content, id=name) for name, text, content in sections)),
    )
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def _verdict(run: Run) -> tuple[str, str, Html]:
    """Title, kind and the sentence below."""
    report = run.report
    failures, warnings = report.failures, report.with_status("warn")
    passed = len(report.with_status("pass"))
    names = " and ".join(run.start.get("adapters", ())) or "the adapter"
    if failures:
        first = failures[0]
        more = f" And {count(len(failures) - 1, 'more failure')} below." if len(failures) > 1 else ""
        return "Unhealthy", "fail", tag("p", tag("b", first.code), f" at step {first.step}: {first.message}.{more}")
    if report.status == "unproven":
        reasons = report.why_unproven()
        more = f" {count(len(reasons) - 1, 'more reason')} below." if len(reasons) > 1 else ""
        return "Unproven", "unknown", tag("p", f"Nothing failed, and not everything was proven. {reasons[0]}.{more}")
    checks = f"{count(passed, 'check')} passed over {count(report.judged_steps, 'probed step')}, none failed"
    if warnings:
        lead = f"{checks}, {count(len(warnings), 'warning')}: {warnings[0].message}."
        return "Healthy, with a warning" if len(warnings) == 1 else "Healthy, with warnings", "warn", tag("p", lead)
    return "Healthy", "pass", tag("p", tag("b", names), f" trains: {checks}.")


def _header(runs: Sequence[Run], title: str, kind: str, lead: Html, links: Sequence[tuple[str, str]]) -> Html:
    run = runs[-1]
    steps = run.steps
    facts = [
        ("adapter", ", ".join(run.start.get("adapters", ()))),
        ("tensors", str(run.start.get("tensors", ""))),
        ("model", ", ".join(run.start.get("model", ()))),
        ("optimizer", ", ".join(run.start.get("optimizers", ()))),
        ("steps", f"{steps[0]} to {steps[-1]}" if steps else "none"),
        ("probed", str(run.report.judged_steps)),
        ("started", str(run.start.get("time", "")).replace("T", " ").replace("+00:00", " UTC")),
    ]
    badge = tag(
        "svg",
        tag("circle", cx=25, cy=25, r=25, class_="disc"),
        tag("path", d=_MARKS[kind], class_="mark"),
        viewBox="0 0 50 50",
        class_="badge",
        aria_hidden="true",
    )
    notes = []
    if not run.ended:
        notes.append("The record has no end: the run was killed, or it still goes on. Shown is what was written.")
    if run.errors:
        notes.append(f"{count(len(run.errors), 'error')} inside the probe itself; the tracebacks are below.")
    if len(runs) > 1:
        earlier = ", ".join(_verdict(r)[0].lower() for r in runs[:-1])
        notes.append(f"This record holds {len(runs)} runs; shown is the last. Before it: {earlier}.")
    return tag(
        "header",
        tag(
            "div",
            tag("p", "LoRA probe", class_="brand"),
            tag("div", badge, tag("div", tag("h1", title), tag("div", lead, class_="lead hang")), class_="verdict"),
            *(tag("p", note, class_="note") for note in notes),
            tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in facts if v), class_="facts"),
            tag("nav", *(tag("a", text, href=f"#{name}") for name, text in links), aria_label="Sections"),
            class_="top",
        ),
        class_=kind,
    )


def _proofs(run: Run) -> Html:
    """One row a claim, and what else keeps the run from being called healthy."""
    proofs = run.report.proofs.values()
    if not proofs:
        return tag("p", "The record holds no proofs.", class_="empty")
    rows = [
        tag(
            "tr",
            tag("td", proof.claim, class_="code"),
            tag("td", f"{proof.proven} of {proof.expected}", class_="num"),
            tag("td", "" if proof.step is None else str(proof.step), class_="num"),
            tag("td", str(proof.idle or ""), class_="num"),
            tag("td", proof.why or proof.detail),
        )
        for proof in proofs
    ]
    titles = ("claim", "tensors", "last at step", "idle", "what is missing, and why")
    head = tag("thead", tag("tr", *(tag("th", t, class_="num" if 0 < i < 4 else None) for i, t in enumerate(titles))))
    about = "Of how many adapter tensors each claim was observed, and renewed since; idle ones had no input."
    missing = [(proof.claim, name) for proof in proofs for name in proof.missing if not proof.sampled]
    lines = "\n".join(f"{claim}: {name}" for claim, name in missing)
    named = tag("details", tag("summary", "The tensors that are missing"), tag("pre", lines)) if missing else Html()
    table = tag("table", head, tag("tbody", *rows), class_="stack")
    return join((tag("p", about, class_="about"), table, named))


def _findings(run: Run) -> Html:
    bad = run.report.with_status("fail", "warn")
    if not bad:
        return tag("p", "No check has failed or warned.", class_="empty")
    return join(_finding(finding) for finding in bad)


def _finding(finding: Finding) -> Html:
    when = f"step {finding.step}"
    if finding.last_step != finding.step:
        when += f" to {finding.last_step}"
    if finding.framework_step != finding.step:
        when += f" (the framework's step {finding.framework_step})"
    evidence = [part for k, v in finding.evidence.items() for part in (tag("dt", k), tag("dd", str(v)))]
    return tag(
        "article",
        tag(
            "div",
            tag("strong", f"{GLYPHS[finding.status]} {finding.code} {finding.name}"),
            tag("span", f"{WORDS[finding.status]}, {when}, seen {count(finding.count, 'time')}"),
            class_="head",
        ),
        tag("p", _sentence(finding.message), class_="message"),
        tag("dl", *evidence, class_="evidence"),
        tag("p", tag("b", "Fix"), finding.fix, class_="fix") if finding.fix else Html(),
        class_=f"finding {finding.status}",
    )


def _not_judged(run: Run) -> Html:
    left = run.report.with_status("pending", "skipped")
    pieces: list[str] = []
    if left:
        rows = [
            tag(
                "tr",
                tag("td", f.code, class_="code"),
                tag("td", f.name),
                tag("td", WORDS[f.status]),
                tag("td", f.message),
            )
            for f in left
        ]
        head = tag("thead", tag("tr", *(tag("th", t) for t in ("code", "check", "", "why"))))
        about = "These are not passed. A check that could not judge says why."
        pieces += [tag("p", about, class_="about"), tag("table", head, tag("tbody", *rows), class_="stack")]
    else:
        pieces.append(tag("p", "Every check has judged.", class_="empty"))
    pieces += [tag("details", tag("summary", "An error inside the probe"), tag("pre", error)) for error in run.errors]
    return join(pieces)


def _environment(run: Run, title: str) -> Html:
    start = run.start
    seen: Mapping[str, Any] = start.get("environment", {})
    findings = run.report.with_status("fail", "warn")
    lines = [
        ", ".join(f"{name} {version}" for name, version in seen.get("versions", {}).items()),
        f"python {seen.get('python')}, {seen.get('platform')}, CUDA of torch: {seen.get('cuda') or 'none'}",
        f"devices: {', '.join(seen.get('devices', ())) or 'none'}",
        f"model: {', '.join(start.get('model', ()))}; optimizer: {', '.join(start.get('optimizers', ()))}",
        f"adapters: {', '.join(start.get('adapters', ()))}; tensors: {start.get('tensors')}; every_n_steps: "
        f"{start.get('every_n_steps')}; on_failure: {start.get('on_failure')}",
        f"verdict: {title.lower()}",
        *(f"{f.code} {f.name} ({f.status}, step {f.step}): {f.message}" for f in findings),
    ]
    return join(
        (
            tag("p", "To paste into an issue. It names no user, no host and no path.", class_="about"),
            tag("pre", "\n".join(lines), class_="copy"),
            tag("footer", tag("code", "lora-probe explain CODE"), " says more of each check."),
        )
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
