"""The metrics of past steps, and the figure that is made of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.records import merged_from, trained

from lora_probe_callbacks import ProbeReport
from lora_probe_callbacks.report.history import MOST_ROWS, History


def test_rows_of_one_step_are_joined() -> None:
    history = History()
    history.add(3, {"lora_probe/a": 1.0})
    history.add(4, {"lora_probe/a": 2.0})
    history.add(3, {"lora_probe/b": 5.0})
    assert history.rows == {3: {"lora_probe/a": 1.0, "lora_probe/b": 5.0}, 4: {"lora_probe/a": 2.0}}
    assert history.series("a") == ([3, 4], [1.0, 2.0])
    assert history.series("b") == ([3], [5.0])


def test_long_run_is_thinned_out_evenly_and_says_so() -> None:
    history = History()
    for step in range(10 * MOST_ROWS):
        if step:  # an update is told by the decision of the next step, before that one's own row
            history.add(step - 1, {"lora_probe/b": float(step - 1)})
        history.add(step, {"lora_probe/a": float(step)})
    steps, values = history.series("a")
    assert len(steps) <= MOST_ROWS
    assert history.stride == 16
    assert steps == list(range(0, 10 * MOST_ROWS, 16))
    assert values == [float(step) for step in steps]
    assert set(history.series("b")[0]) <= set(steps)


def test_interval_is_students_t_and_needs_two_prompts() -> None:
    history = History()
    for step, count in enumerate((5.0, 1.0)):
        values = {"delta_1": 1.0, "standard_error": 0.5, "count": count}
        history.add(step, {f"lora_probe/estimator/{name}": value for name, value in values.items()})
    ends = history.interval()
    assert list(ends) == [0]
    assert ends[0] == pytest.approx((1 - 2.776445 * 0.5, 1 + 2.776445 * 0.5), abs=1e-5)  # 4 degrees of freedom


def test_plot_draws_what_was_logged_and_where_it_failed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = trained(tmp_path / "run.jsonl", event=merged_from(5))
    figure = report.plot()
    gradients = figure.axes[0]
    lines = {line.get_label(): line for line in gradients.get_lines()}
    steps, values = report.history.series("gradient/norm_B")
    assert list(lines["B"].get_xdata()) == steps == list(range(6))
    assert list(lines["B"].get_ydata()) == values
    assert [text.get_text() for text in gradients.texts] == ["LP103"]
    assert "unhealthy (6 probed steps)" in figure.get_suptitle()
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_plot_shows_the_estimator_where_one_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = trained(tmp_path / "run.jsonl", steps=4)
    assert len(report.plot().axes) == 3
    for step in range(4):
        values = {"delta_1": 0.1 * step, "standard_error": 0.5, "count": 5.0}
        report.history.add(step, {f"lora_probe/estimator/{name}": value for name, value in values.items()})
    figure = report.plot()
    assert len(figure.axes) == 4
    assert len(figure.axes[3].collections) == 1  # the interval


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lora_probe_callbacks\[plots\]'"):
        ProbeReport().plot()


def test_plot_without_a_step_says_so() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="without a probed step"):
        ProbeReport().plot()
