"""A figure for notebooks; matplotlib is an extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lora_probe_callbacks.report.report import ProbeReport

__all__ = ["plot"]

# Okabe and Ito's colours, which colour-blind eyes tell apart; lines differ in style and marker as well.
_BLUE, _ORANGE, _RED = "#0072B2", "#E69F00", "#D55E00"


def plot(report: ProbeReport) -> Figure:
    """Gradient norms, updates and findings over the probed steps, and delta_1 where an estimator was watched.

    Args:
        report: A report with at least one probed step.

    Returns:
        The figure. It belongs to no window: a notebook shows it, ``savefig`` writes it.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If no step was probed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib, which is not installed: pip install 'lora_probe_callbacks[plots]'"
        ) from error
    history = report.history
    if not history.rows:
        raise ValueError("got a report without a probed step, expected one of a run that has begun: train first")
    has_estimator = bool(history.series("estimator/delta_1")[0])
    figure = Figure(figsize=(9, 8.2 if has_estimator else 6.4), layout="constrained")
    axes = figure.subplots(4 if has_estimator else 3, 1, sharex=True)
    _lines(axes[0], report, ("gradient/norm_A", "gradient/norm_B"), "gradient norm", log=True)
    _lines(axes[1], report, ("update/relative_norm",), "update / weight", log=True)
    _lines(axes[2], report, ("update/moved_fraction_A", "update/moved_fraction_B"), "elements moved")
    axes[2].set_ylim(-0.05, 1.05)
    if has_estimator:
        _lines(axes[3], report, ("estimator/delta_1",), "delta_1")
        _interval(axes[3], report)
    for ax in axes:
        for finding in report.with_status("fail", "warn"):
            style = "-" if finding.status == "fail" else ":"
            ax.axvline(finding.framework_step, color=_RED, linestyle=style, linewidth=1)
    for finding in report.with_status("fail", "warn"):
        axes[0].annotate(
            finding.code,
            (finding.framework_step, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=9,
            color=_RED,
        )
    word = {True: "healthy", False: "unhealthy", None: "could not judge"}[report.healthy]
    thinned = f", one in {history.stride} drawn" if history.stride > 1 else ""
    figure.suptitle(f"LoRA probe: {word} ({report.judged_steps} probed steps{thinned})")
    axes[-1].set_xlabel("step")
    return figure


def _lines(ax: Any, report: ProbeReport, names: tuple[str, ...], label: str, *, log: bool = False) -> None:
    styles = ((_BLUE, "o-"), (_ORANGE, "s--"))
    drawn: list[float] = []
    for name, (colour, style) in zip(names, styles, strict=False):
        steps, values = report.history.series(name)
        if steps:
            drawn += values
            ax.plot(steps, values, style, color=colour, markersize=3.5, linewidth=1.3, label=name.rpartition("_")[2])
    ax.set_ylabel(label)
    ax.grid(alpha=0.25)
    positive = [value for value in drawn if value > 0]
    if log and positive:  # with room for the exact zero of A at the first step
        ax.set_yscale("symlog", linthresh=min(positive))
        ax.set_ylim(bottom=0)
    if len(names) > 1 and drawn:
        ax.legend(loc="best", fontsize=9)


def _interval(ax: Any, report: ProbeReport) -> None:
    ends = report.history.interval()
    if ends:
        low, high = zip(*ends.values(), strict=True)
        ax.fill_between(list(ends), low, high, color=_BLUE, alpha=0.2)
    ax.axhline(0, color="gray", linewidth=0.8)
