"""The metrics of past steps, for a plot after the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["MOST_ROWS", "History"]

MOST_ROWS = 2048


@dataclass(slots=True)
class History:
    """One row of metrics a probed step. Full, it forgets every second row and says so.

    Attributes:
        rows: The framework's number of a step to the metrics of that step.
        stride: Kept is about one probed step in so many.
    """

    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    stride: int = 1
    _seen: int = 0
    _last: int | None = None

    def add(self, framework_step: int, values: Mapping[str, float]) -> None:
        """Add metrics of a step, which may have some already.

        Args:
            framework_step: The framework's number of the step.
            values: Metric name to value.
        """
        row = self.rows.get(framework_step)
        if row is not None:
            row.update(values)
            return
        if framework_step == self._last:
            return  # more of a step that was left out
        self._last = framework_step
        self._seen += 1
        if (self._seen - 1) % self.stride:
            return
        self.rows[framework_step] = dict(values)
        if len(self.rows) > MOST_ROWS:
            self.rows = {step: self.rows[step] for step in list(self.rows)[::2]}
            self.stride *= 2

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """One metric over the steps.

        Args:
            name: Its name under ``lora_probe/``, for instance ``"gradient/norm_B"``.

        Returns:
            The steps at which it is known, and its values there.
        """
        found = [(step, row[f"lora_probe/{name}"]) for step, row in self.rows.items() if f"lora_probe/{name}" in row]
        return [step for step, _ in found], [value for _, value in found]

    def interval(self) -> dict[int, tuple[float, float]]:
        """The interval of `delta_1` at 95%: as it was logged, else Student's t from what was.

        Returns:
            Step to lower and upper end, for the steps at which there is one.
        """
        from scipy import stats

        names = ("estimator/delta_1", "estimator/standard_error", "estimator/count")
        delta, error, count = (dict(zip(*self.series(name), strict=True)) for name in names)
        ends = {}
        for step in delta.keys() & error.keys() & count.keys():
            if count[step] >= 2:
                half = float(stats.t.ppf(0.975, count[step] - 1)) * error[step]
                ends[step] = (delta[step] - half, delta[step] + half)
        lower, upper = (dict(zip(*self.series(f"estimator/{end}"), strict=True)) for end in ("lower", "upper"))
        ends |= {step: (lower[step], upper[step]) for step in lower.keys() & upper.keys()}
        return dict(sorted(ends.items()))
