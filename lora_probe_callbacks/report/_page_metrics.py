"""The curves: metrics, the estimator, the step response."""

from __future__ import annotations

from lora_probe_callbacks.report.charts import line, number
from lora_probe_callbacks.report.html import Html, join, tag
from lora_probe_callbacks.report.runs import Run

__all__ = ["estimator", "examples", "metrics", "step_response"]

_STEPS = 5  # whose examples are shown


def estimator(run: Run) -> Html:
    """The predicted change over the steps with its interval, or why there is none."""
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
    about += ", with its interval at 95% over the prompts, which allows for skewness." if known else "."
    why = _reasons(run, "LP305", "could not judge")
    about += f" In some steps it was not computed: {why}." if why else ""
    return join((tag("p", about, class_="about"), chart))


def examples(run: Run) -> Html:
    """The most and least helpful examples of the last scored steps."""
    if not run.examples:
        text = "No examples were scored. With examples= the probe scores the examples of every step as they train."
        return tag("p", text, class_="empty")
    about = (
        "How much a step along the first direction would lower an example's part of the loss (its gain), of the last "
        f"{min(len(run.examples), _STEPS)} of {len(run.examples)} scored steps. Negative: the example pulls against it."
    )
    titles = ("step", "", "example", "gain", "norm of its gradient", "text")
    rows = [
        tag(
            "tr",
            tag("td", str(listing["step"]), class_="num"),
            tag("td", f"{end} helpful"),
            tag("td", str(entry["id"]), class_="code"),
            tag("td", f"{entry['gain']:+.3g}", class_="num"),
            tag("td", f"{entry['norm']:.3g}" if entry.get("norm") is not None else "", class_="num"),
            tag("td", entry.get("text", "")),
        )
        for listing in run.examples[-_STEPS:]
        for end in ("least", "most")
        for entry in listing[end]
        if entry["gain"] is not None
    ]
    head = tag("thead", tag("tr", *(tag("th", title) for title in titles)))
    return join((tag("p", about, class_="about"), tag("table", head, tag("tbody", *rows), class_="stack")))


def _reasons(run: Run, code: str, beginning: str = "") -> str:
    """Why a check could not judge, each reason once."""
    verdicts = (decision.verdicts.get(code, {}) for decision in run.decisions)
    all_said = (v.get("message", "") for v in verdicts if v.get("status") == "skipped")
    said = dict.fromkeys(m for m in all_said if m.startswith(beginning) and not m.startswith("explained by"))
    # The last of several in a row adds that no more follow.
    return "; ".join(m for m in said if not any(other != m and other.startswith(m) for other in said))


def step_response(run: Run) -> Html:
    """The measured change of the loss at each step beside the predicted one, and their ratio."""
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


def metrics(run: Run) -> Html:
    """A small curve for each metric that went to the loggers."""
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
