"""The page: a record as one HTML file that opens from disk and needs nothing else.

No script and no network: its content security policy forbids both, so that not even a text that
slipped through unescaped could do anything. Colours are never alone: verdicts differ in pattern and
sign as well, heatmaps in lightness.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from lora_probe_callbacks.report.charts import PATTERNS, Scale, heatmap, line, number, scale_bar
from lora_probe_callbacks.report.findings import Finding
from lora_probe_callbacks.report.html import Html, join, tag
from lora_probe_callbacks.report.runs import Cell, Decision, Run, Tensor

__all__ = ["page"]

_COLUMNS = 72  # more steps, or more layers, are drawn several to a cell
_ROWS = 84

_WORST = ("fail", "warn", "pass", "pending", "skipped")
_GLYPHS = {"pass": "✓", "warn": "!", "fail": "✕", "pending": "…", "skipped": ""}
_WORDS = {
    "pass": "passed",
    "warn": "warns",
    "fail": "fails",
    "pending": "too early to say",
    "skipped": "not judged",
}
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
        ("timeline", "Timeline of the checks", _timeline(run)),
        ("gradients", "Gradient norms", _maps(run, "gradients")),
        ("updates", "Update sizes", _maps(run, "updates")),
        ("estimator", "Predicted change", _estimator(run)),
        ("step-response", "Step response", _step_response(run)),
        ("metrics", "Metrics", _metrics(run)),
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


# --- the verdict ------------------------------------------------------------------------------


def _verdict(run: Run) -> tuple[str, str, Html]:
    """Title, kind and the sentence below."""
    report = run.report
    failures, warnings = report.failures, report.with_status("warn")
    passed = len(report.with_status("pass"))
    names = " and ".join(run.start.get("adapters", ())) or "the adapter"
    if failures:
        first = failures[0]
        more = f" And {_count(len(failures) - 1, 'more failure')} below." if len(failures) > 1 else ""
        return "Unhealthy", "fail", tag("p", tag("b", first.code), f" at step {first.step}: {first.message}.{more}")
    if report.healthy is None:
        return "Could not judge", "unknown", tag("p", "No step was judged, so nothing can be called healthy.")
    checks = f"{_count(passed, 'check')} passed over {_count(report.judged_steps, 'probed step')}, none failed"
    if warnings:
        lead = f"{checks}, {_count(len(warnings), 'warning')}: {warnings[0].message}."
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
        notes.append(f"{_count(len(run.errors), 'error')} inside the probe itself; the tracebacks are below.")
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
            tag("strong", f"{_GLYPHS[finding.status]} {finding.code} {finding.name}"),
            tag("span", f"{_WORDS[finding.status]}, {when}, seen {_count(finding.count, 'time')}"),
            class_="head",
        ),
        tag("p", _sentence(finding.message), class_="message"),
        tag("dl", *evidence, class_="evidence"),
        tag("p", tag("b", "Fix"), finding.fix, class_="fix") if finding.fix else Html(),
        class_=f"finding {finding.status}",
    )


# --- the timeline -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    """Decisions that share a column of the timeline."""

    label: str
    statuses: Mapping[str, tuple[str, str]]  # code -> status and message


def _timeline(run: Run) -> Html:
    columns = _columns(run)
    if not columns:
        return tag("p", "No decision was recorded.", class_="empty")
    legend = tag(
        "div",
        *(
            tag("span", tag("span", _GLYPHS[status], class_=f"seg {status}"), _WORDS[status], class_="key")
            for status in _WORST
        ),
        class_="legend",
    )
    known = {check["code"]: check for check in run.start.get("checks", ())}
    codes = sorted({code for column in columns for code in column.statuses})
    strips: list[Html] = []
    for family, members in itertools.groupby(codes, key=lambda code: known.get(code, {}).get("family", "")):
        strips.append(tag("h3", family, class_="family"))
        strips += [_strip(code, known.get(code, {}), columns) for code in members]
    return join(
        (
            tag("p", "One strip for each check, from the start of the run to its end.", class_="about"),
            legend,
            tag("div", *strips, _ticks(columns), class_="strips"),
        )
    )


def _columns(run: Run) -> list[_Column]:
    """What each decision said; a verdict on an update stands at the step that made it."""
    at: dict[int, int] = {}
    labels, cells = [], []
    for index, decision in enumerate(run.decisions):
        if decision.moment in ("step", "skipped"):
            at[decision.step] = index
        labels.append(str(decision.step) if decision.moment in ("step", "skipped") else decision.moment)
        cells.append({code: (v["status"], v.get("message", "")) for code, v in decision.verdicts.items()})
    for index, decision in enumerate(run.decisions):
        place = at.get(-1 if decision.update_step is None else decision.update_step)
        for code, verdict in decision.verdicts.items():
            if verdict.get("of_update") and place is not None and place < index:
                cells[place][code] = cells[index].pop(code)
    if labels and labels[-1] == "end" and not any(status in ("fail", "warn") for status, _ in cells[-1].values()):
        del cells[-1], labels[-1]  # nothing more was seen; what the last update left open stands at its step
    size = math.ceil(len(cells) / _COLUMNS) or 1
    columns = []
    for start in range(0, len(cells), size):
        together = cells[start : start + size]
        codes = dict.fromkeys(code for cell in together for code in cell)
        worst = {
            code: min((cell[code] for cell in together if code in cell), key=lambda s: _WORST.index(s[0]))
            for code in codes
        }
        columns.append(_Column(labels[start], worst))
    return columns


def _strip(code: str, check: Mapping[str, Any], columns: Sequence[_Column]) -> Html:
    cells = [column.statuses.get(code, ("skipped", "not judged")) for column in columns]
    segments, start = [], 0
    for status, group in itertools.groupby(cells, key=lambda cell: cell[0]):
        members = list(group)
        end = start + len(members)
        first, last = columns[start].label, columns[end - 1].label
        where = f"step {first}" if first == last else f"step {first} to {last}"
        said = f"{where}: {_WORDS[status]}" + (f" ({members[-1][1]})" if members[-1][1] else "")
        segments.append(
            tag(
                "span",
                tag("span", _GLYPHS[status], aria_hidden="true"),
                tag("span", said, class_="sr"),
                class_=f"seg {status}",
                title=said,
                style=f"grid-column:{start + 1}/{end + 1}",
            )
        )
        start = end
    statuses = {cell[0] for cell in cells}
    worst = min(statuses, key=_WORST.index)
    state = {"fail": " is-fail", "warn": " is-warn", "pending": " idle", "skipped": " idle"}.get(worst, "")
    return tag(
        "div",
        tag("div", tag("span", code, class_="code"), str(check.get("name", "")), class_="who", title=check.get("what")),
        tag("div", *segments, class_="bars", style=f"grid-template-columns:repeat({len(columns)},minmax(0,1fr))"),
        class_=f"strip{state}",
    )


def _ticks(columns: Sequence[_Column]) -> Html:
    return tag(
        "div", tag("div", class_="who"), _axis([c.label for c in columns]), class_="strip axis", aria_hidden="true"
    )


def _axis(labels: Sequence[str], most: int = 7) -> Html:
    """Labels below cells of equal width: the first, the last, and some between."""
    every = max(1, math.ceil((len(labels) - 1) / (most - 1)))
    shown = [i for i in range(0, len(labels), every) if i == 0 or len(labels) - 1 - i >= every / 2]
    if len(labels) > 1:
        shown.append(len(labels) - 1)
    spans = []
    for i in dict.fromkeys(shown):
        left, edge = (0.0, None) if i == 0 else (100 * (i + 0.5) / len(labels), None)
        if i == len(labels) - 1 and i:
            left, edge = 100.0, "edge"
        spans.append(tag("span", labels[i], class_=edge, style=f"left:{left:.4g}%"))
    return tag("div", *spans, class_="ticks num")


# --- the heatmaps -----------------------------------------------------------------------------

_ABOUT = {
    "gradients": "Euclidean norm of every adapter gradient, as it was read at the step. While B is still zero, every "
    "gradient of A is exactly zero: that is how LoRA starts.",
    "updates": "Euclidean norm of what each step changed in every adapter tensor.",
}


def _maps(run: Run, what: str) -> Html:
    read: Callable[[Decision], tuple[int | None, Mapping[Tensor, Cell]]] = (
        (lambda d: (d.step, d.gradients)) if what == "gradients" else (lambda d: (d.update_step, d.updates))
    )
    by_step: dict[int, dict[Tensor, Cell]] = {}
    for decision in run.decisions:
        step, values = read(decision)
        seen = {tensor: cell for tensor, cell in values.items() if cell is not None}
        if step is not None and seen:
            by_step.setdefault(step, {}).update(seen)
    if not by_step:
        return tag("p", f"No {what} were recorded.", class_="empty")
    steps = sorted(by_step)
    tensors = list(dict.fromkeys(tensor for values in by_step.values() for tensor in values))
    tables: dict[str, dict[tuple[str, str], list[Cell]]] = {}
    for role in ("A", "B", "other"):
        for tensor in tensors:
            if tensor.role == role:
                row = [by_step[step].get(tensor) for step in steps]
                rows = tables.setdefault(role, {})
                key = (tensor.layer, tensor.adapter)
                rows[key] = [_together(pair) for pair in zip(rows[key], row, strict=True)] if key in rows else row
    pieces: list[str] = [tag("p", _ABOUT[what], class_="about")]
    paired = [tables[role] for role in ("A", "B") if role in tables]
    if paired:
        pieces.append(_map_group(steps, {role: tables[role] for role in ("A", "B") if role in tables}, what))
    if "other" in tables:
        pieces.append(_map_group(steps, {"other tensors": tables["other"]}, what))
    pieces.append(_numbers(steps, tables, what))
    return join(pieces)


def _map_group(steps: Sequence[int], tables: Mapping[str, Mapping[tuple[str, str], list[Cell]]], what: str) -> Html:
    """Heatmaps side by side, with one scale and the same rows."""
    keys = list(dict.fromkeys(key for table in tables.values() for key in table))
    per_row, per_column = math.ceil(len(keys) / _ROWS), math.ceil(len(steps) / _COLUMNS)
    blank: list[Cell] = [None] * len(steps)
    drawn = {
        role: [
            [
                _together([c for row in rows for c in row[x : x + per_column]], mean_of=per_column)
                for x in range(0, len(steps), per_column)
            ]
            for y in range(0, len(keys), per_row)
            for rows in [[table.get(key, blank) for key in keys[y : y + per_row]]]
        ]
        for role, table in tables.items()
    }
    scale = Scale([cell for rows in drawn.values() for row in rows for cell in row])
    names = _short_names(keys)[::per_row]
    height = max(5.0, min(18.0, 560 / len(names)))
    every = math.ceil(11 / height)
    labels = [
        tag("div", name, title=keys[i * per_row][0], style=f"height:{every * height:g}px;line-height:{height:g}px")
        for i, name in enumerate(names)
        if i % every == 0
    ]
    ticks = _axis([str(step) for step in steps[::per_column]], most=4)
    maps = [
        tag(
            "div",
            tag("h3", role),
            heatmap(rows, scale, height=height, label=f"{what} of {role}: layers by steps"),
            ticks,
        )
        for role, rows in drawn.items()
    ]
    notes = []
    if per_row > 1:
        notes.append(f"each row joins {per_row} layers (norm over all of them)")
    if per_column > 1:
        notes.append(f"each column joins {per_column} probed steps (root mean square)")
    return join(
        (
            scale_bar(scale),
            tag("p", f"{'; '.join(notes).capitalize()}.", class_="about") if notes else Html(),
            tag(
                "div",
                tag("div", tag("h3", Html("&nbsp;")), *labels, class_="names num"),
                *maps,
                class_="maps one" if len(maps) == 1 else "maps",
            ),
        )
    )


def _together(cells: Sequence[Cell], mean_of: int = 1) -> Cell:
    """One value for several tensors (the norm of all) and several steps (the mean square)."""
    found = [cell for cell in cells if cell is not None]
    if not found:
        return None
    if "non-finite" in found:
        return "non-finite"
    norms = [cell for cell in found if isinstance(cell, float | int)]
    if not norms:
        return "none"
    return math.sqrt(sum(norm * norm for norm in norms) / mean_of)


def _short_names(keys: Sequence[tuple[str, str]]) -> list[str]:
    """Names of layers without what all have in common; first and last part where that is enough."""
    several = len({adapter for _, adapter in keys}) > 1
    parts = [layer.split(".") for layer, _ in keys]
    common = 0
    while len(keys) > 1 and all(len(p) > common + 1 for p in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    left = [p[common:] for p in parts]
    brief = [f"{p[0]} {p[-1]}" if len(p) > 1 else p[0] for p in left]
    names = brief if len(set(brief)) >= len({tuple(p) for p in left}) else [".".join(p) for p in left]
    return [f"{name} [{adapter}]" if several else name for name, (_, adapter) in zip(names, keys, strict=True)]


def _numbers(steps: Sequence[int], tables: Mapping[str, Mapping[tuple[str, str], list[Cell]]], what: str) -> Html:
    rows = [
        tag(
            "tr",
            tag("td", layer),
            tag("td", role),
            *(tag("td", _cell(cell), class_="num") for cell in (row[0], row[-1], _largest(row))),
        )
        for role, table in tables.items()
        for (layer, _), row in table.items()
    ]
    titles = ("layer", "tensor", f"step {steps[0]}", f"step {steps[-1]}", "largest")
    head = tag("thead", tag("tr", *(tag("th", t, class_="num" if i > 1 else None) for i, t in enumerate(titles))))
    table = tag("table", head, tag("tbody", *rows))
    return tag("details", tag("summary", f"The {what} in numbers"), tag("div", table, class_="scroll"))


def _cell(cell: Cell) -> str:
    if cell is None:
        return "not read"
    return cell if isinstance(cell, str) else number(cell)


def _largest(row: Sequence[Cell]) -> Cell:
    return max((cell for cell in row if isinstance(cell, float | int)), default=None)


# --- metrics ----------------------------------------------------------------------------------


def _estimator(run: Run) -> Html:
    steps, values = run.history.series("estimator/delta_1")
    if not steps:
        why = _reasons(run, "LP305", "could not judge")
        text = "With estimator= the probe logs the first-order change that it predicts."
        text = f"No estimate was computed: {why}." if why else f"No estimator was recorded. {text}"
        return tag("p", text, class_="empty")
    ends = run.history.interval()
    known = all(step in ends for step in steps)
    band = ([ends[s][0] for s in steps], [ends[s][1] for s in steps]) if known else None
    chart = line(steps, [("a", values)], band=band, zero=True, label="delta_1 over steps")
    about = "delta_1, the change that the first order predicts for a step"
    about += ", with its interval at 95% (Student's t over the prompts)." if known else "."
    why = _reasons(run, "LP305", "could not judge")
    about += f" In some steps it was not computed: {why}." if why else ""
    return join((tag("p", about, class_="about"), chart))


def _reasons(run: Run, code: str, beginning: str = "") -> str:
    """Why a check could not judge, each reason once."""
    verdicts = (decision.verdicts.get(code, {}) for decision in run.decisions)
    all_said = (v.get("message", "") for v in verdicts if v.get("status") == "skipped")
    said = dict.fromkeys(m for m in all_said if m.startswith(beginning) and not m.startswith("explained by"))
    # The last of several in a row adds that no more follow.
    return "; ".join(m for m in said if not any(other != m and other.startswith(m) for other in said))


def _step_response(run: Run) -> Html:
    steps, measured = run.history.series("step_response/measured")
    same, predicted = run.history.series("step_response/predicted")
    if not steps or steps != same:
        why = _reasons(run, "LP307") or "the measured change of the loss at a step, beside the predicted one"
        return tag("p", f"No step response was recorded: {why}.", class_="empty")
    about = (
        "What a step changed the loss by: measured (solid), and predicted by its gradient (dashed). Their ratio tends "
        "to 1 for small steps."
    )
    why = _reasons(run, "LP307")
    about += f" In some steps it says nothing: {why}." if why else ""
    chart = line(
        steps, [("a", measured), ("b", predicted)], zero=True, label="measured and predicted change over steps"
    )
    ratio = [_metric(run, "step_response/ratio")] if run.history.series("step_response/ratio")[0] else []
    return join((tag("p", about, class_="about"), chart, tag("div", *ratio, class_="many")))


def _metrics(run: Run) -> Html:
    names = dict.fromkeys(name.removeprefix("lora_probe/") for row in run.history.rows.values() for name in sorted(row))
    shown = sorted(n for n in names if not n.startswith(("step_response/",)))
    if not shown:
        return tag("p", "No metrics were recorded.", class_="empty")
    about = "What the loggers got, with the last value; steps are those of the framework."
    if run.history.stride > 1:
        about += f" Drawn is one probed step in {run.history.stride}."
    return join((tag("p", about, class_="about"), tag("div", *(_metric(run, name) for name in shown), class_="many")))


def _metric(run: Run, name: str) -> Html:
    steps, values = run.history.series(name)
    unit = name == "healthy" or "fraction" in name or "coverage" in name
    head = tag("div", tag("span", name), tag("span", number(values[-1]), class_="num"), class_="name")
    return tag(
        "div", head, line(steps, [("a", values)], height=44, unit=unit, label=f"{name} over steps"), class_="metric"
    )


# --- the rest ---------------------------------------------------------------------------------


def _not_judged(run: Run) -> Html:
    left = run.report.with_status("pending", "skipped")
    pieces: list[str] = []
    if left:
        rows = [
            tag(
                "tr",
                tag("td", f.code, class_="code"),
                tag("td", f.name),
                tag("td", _WORDS[f.status]),
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


def _count(number_: int, noun: str) -> str:
    return f"{number_} {noun}" if number_ == 1 else f"{number_} {noun}s"
